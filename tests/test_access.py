"""Tokens: the file, which tokens are accepted, and rate limits."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actserve.core.errors import RateLimited, Unauthorized, UsageError
from actserve.server.access.tokens import CHECK_EVERY_S, PREFIX, Access, Token, add_token, read_tokens
from actserve.server.admission import Ticket
from tests.clock import Clock
from tests.command_line import actserve


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.0)


def bearer(token: str) -> bytes:
    return f"Bearer {token}".encode()


def test_a_token_lets_in_and_its_file_does_not(file: Path) -> None:
    token = add_token(file, "robot")
    access = Access(file)
    assert access.identify(bearer(token)).name == "robot"
    assert access.identify(b"bearer  " + token.encode()).name == "robot", "RFC 9110: the scheme in any case"
    assert token.startswith(PREFIX)
    assert len(token) > 40
    text = file.read_text()
    assert token not in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for part in text.split():
        with pytest.raises(Unauthorized):
            access.identify(bearer(part))


@pytest.mark.parametrize(
    "given",
    [
        None, b"", b"Bearer", b"Bearer ", "Basic {}", "Bearer {}x", "Bearer {} ", " Bearer {}", "Bearer{}",
        "Bearer {} {}", "Bearer {}\x00", "{}", "Bearer " + "x" * 5000,
    ],
)  # fmt: skip
def test_nothing_else_does(file: Path, given: bytes | str | None) -> None:
    token = add_token(file, "robot")
    if isinstance(given, str):
        given = given.replace("{}", token).encode()
    with pytest.raises(Unauthorized) as refused:
        Access(file).identify(given)
    assert token not in refused.value.message


@given(st.binary(max_size=100) | st.binary(max_size=100).map(lambda rest: b"Bearer " + rest))
def test_no_header_makes_trouble(authorization: bytes) -> None:
    file = Path(os.environ["XDG_CACHE_HOME"]) / "tokens-of-nobody"
    file.write_text("# nobody\n")
    with pytest.raises(Unauthorized):
        Access(file).identify(authorization)


def test_what_the_file_says_of_a_token(file: Path) -> None:
    add_token(file, "fast", rate=100)
    add_token(file, "slow", rate=0.25, sessions=3)
    add_token(file, "slow")  # two lines may have one name
    file.write_text(file.read_text().rstrip("\n"))  # an editor may leave no end of line
    add_token(file, "last")
    found = read_tokens(file)
    assert [(token.name, token.rate, token.sessions) for token in found] == [
        ("fast", 100, None),
        ("slow", 0.25, 3),
        ("slow", 0, None),
        ("last", 0, None),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "robot", "robot abc", f"robot {'0' * 63}", f"robot {'0' * 65}", f"robot {'G' * 64}", f"../x {'0' * 64}",
        f"robot {'0' * 64} rate=-1", f"robot {'0' * 64} rate=inf", f"robot {'0' * 64} sessions=0",
        f"robot {'0' * 64} speed=1", f"robot {'0' * 64} x", f"robot {'0' * 64} rate=1 rate=2", f"é {'0' * 64}",
        f"robot {'0' * 64}\nother {'0' * 64}",
    ],
)  # fmt: skip
def test_a_file_that_says_something_else_is_refused_and_the_line_is_named(file: Path, line: str) -> None:
    file.write_text(f"# good\n\n{line}\n")
    with pytest.raises(UsageError, match=r"line [34]: expected"):
        Access(file)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        Access(tmp_path / "nowhere")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read"):
        Access(tmp_path / "binary")
    with pytest.raises(UsageError, match="cannot be written"):
        add_token(tmp_path / "no" / "folder", "robot")
    with pytest.raises(UsageError, match="expected a name"):
        add_token(tmp_path / "tokens", "a b")


def test_changes_are_seen_within_a_second(file: Path, clock: Clock) -> None:
    old = add_token(file, "robot", rate=10)
    access = Access(file, clock=clock)
    held = access.identify(bearer(old))
    new = add_token(file, "robot", rate=10)
    with pytest.raises(Unauthorized):
        access.identify(bearer(new))
    clock.now_s += CHECK_EVERY_S
    assert access.identify(bearer(new)).name == "robot"
    assert access.identify(bearer(old)) is held, "what stays keeps what is left to it"
    generation = access.generation
    file.write_text(file.read_text().splitlines()[1])
    clock.now_s += CHECK_EVERY_S
    with pytest.raises(Unauthorized):
        access.identify(bearer(old))
    assert held.revoked
    with pytest.raises(Unauthorized):
        held.charge()
    assert access.generation == generation + 1


@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: file.write_text("nonsense")])
def test_a_file_that_breaks_lets_nobody_in_or_out(
    file: Path, clock: Clock, spoil: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    token = add_token(file, "robot")
    access = Access(file, clock=clock)
    spoil(file)
    for _ in range(3):
        clock.now_s += CHECK_EVERY_S
        assert access.identify(bearer(token)).name == "robot"
    assert len(caplog.records) == 1, "and the log says so once"


def test_a_rate_is_kept(clock: Clock) -> None:
    token = Token("robot", b"", rate=10, clock=clock)
    admitted = 0
    for _ in range(1000):  # ten seconds, a request each hundredth
        clock.now_s += 0.01
        try:
            token.charge()
            admitted += 1
        except RateLimited as error:
            assert error.retry_after_s == 1
    assert 105 <= admitted <= 111, "what came at first, and ten a second"


def test_a_slow_rate_says_how_long_to_wait(clock: Clock) -> None:
    token = Token("robot", b"", rate=0.25, clock=clock)
    token.charge()
    with pytest.raises(RateLimited) as refused:
        token.charge()
    assert refused.value.retry_after_s == 4
    clock.now_s += 4
    token.charge()


@pytest.mark.parametrize("known_at_once", [True, False])
def test_a_batch_is_paid_for_by_the_next_requests(clock: Clock, known_at_once: bool) -> None:
    token = Token("robot", b"", rate=10, clock=clock)
    ticket = Ticket(token)
    for items in (50, 50) if known_at_once else (1, 50, 50):
        ticket.charge(items)
    with pytest.raises(RateLimited) as refused:
        token.charge()
    assert refused.value.retry_after_s == 5
    clock.now_s += 4.2
    token.charge()


def test_each_worker_grants_its_share(file: Path) -> None:
    token = add_token(file, "robot", rate=100)
    assert Access(file, workers=4).identify(bearer(token)).rate == 25


def test_tokens_as_a_user_types_them(tmp_path: Path) -> None:
    file = str(tmp_path / "tokens")
    made = actserve("tokens", "new", "robot", "--rate", "100", "--file", file)
    assert made.returncode == 0, made.stderr
    assert Access(Path(file)).identify(bearer(made.stdout.strip())).rate == 100
    shown = actserve("tokens", "show", "--file", file)
    assert shown.stdout.startswith("robot  ")
    assert "100 requests per second" in shown.stdout
    assert made.stdout.strip() not in shown.stdout
    wrong = actserve("tokens", "new", "a b", "--file", file)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
