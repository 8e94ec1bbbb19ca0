"""The owner of a session: ids, owners, and names that clients choose."""

from __future__ import annotations

from pathlib import Path

import pytest

from actserve.core.completion import MAX_SEED
from actserve.core.errors import InvalidRequest, SessionElsewhere, SessionExpired, SessionsUnavailable, UnknownSession
from actserve.server.sessions import SessionLimits, Sessions
from actserve.server.sessions.ids import home_of
from tests.clock import Clock
from tests.fake_policy import NAME


def test_an_id_is_genuine_or_unknown(sessions_file: Path) -> None:
    with Sessions(sessions_file, SessionLimits(), Clock()) as sessions:
        session = sessions.begin(NAME, 1)
        assert sessions.get(NAME, session.id) == session
        forged = [session.id[:-1] + ("A" if session.id[-1] != "A" else "B"), session.id[1:], session.id + "A"]
        for id_ in [*forged, "", "1", "?" * 32, "ö" * 32, "A" * 32, session.id + "=", session.id + "\n"]:
            with pytest.raises(UnknownSession):
                sessions.get(NAME, id_)
        with pytest.raises(UnknownSession, match="no session of other has this id"):
            sessions.get("other", session.id)
        assert len({sessions.begin(NAME, 1).id for _ in range(100)}) == 100


def test_an_id_names_the_home_that_alone_has_the_session(tmp_path: Path) -> None:
    homes = (0, 5, (1 << 23) - 1)
    held = [Sessions(tmp_path / f"{home}.sqlite", SessionLimits(), home=home) for home in homes]
    for home, sessions in zip(homes, held, strict=True):
        with sessions:
            ids = [sessions.begin(NAME, 1).id for _ in range(3)]
            assert {home_of(id_) for id_ in ids} == {home}
            assert [sessions.get(NAME, id_).id for id_ in ids] == ids
            for other in held:
                if other is not sessions:
                    with other, pytest.raises(SessionElsewhere, match="another host holds the session"):
                        other.get(NAME, ids[0])
            for forged in (ids[0][:-4] + "AAAA", "nonsense!"):
                with pytest.raises(UnknownSession):
                    sessions.get(NAME, forged)
    assert home_of("nonsense!") is None


def test_the_first_four_characters_of_an_id_are_its_home(tmp_path: Path) -> None:
    """Proxies rely on it."""
    homes = {0: "AAAA", 1: "AAAB", 2: "AAAC", 4096: "ABAA", (1 << 23) - 1: "f___"}
    for home, prefix in homes.items():
        with Sessions(tmp_path / f"{home}.sqlite", SessionLimits(), home=home) as sessions:
            assert {sessions.begin(NAME, 1).id[:4] for _ in range(3)} == {prefix}


def test_a_file_gets_the_home_of_its_host_once(sessions_file: Path) -> None:
    with Sessions(sessions_file, SessionLimits()) as sessions:  # before the host has a number
        sessions.begin(NAME, 1)
    for _ in range(2):
        with Sessions(sessions_file, SessionLimits(), home=5) as sessions:
            id_ = sessions.begin(NAME, 1).id
            assert home_of(id_) == 5
            assert sessions.get(NAME, id_).id == id_
    with pytest.raises(SessionsUnavailable, match="HOME=5, and this host has 4: give each host its own file"):
        Sessions(sessions_file, SessionLimits(), home=4).__enter__()


def test_an_owner_sees_its_own(sessions_file: Path) -> None:
    with Sessions(sessions_file, SessionLimits()) as sessions:
        mine = [sessions.begin(NAME, 1, owner="me") for _ in range(3)]
        sessions.begin(NAME, 1, owner="you")
        sessions.begin("other", 1, owner="me")
        sessions.begin(NAME, 1)
        assert [session.id for session in sessions.owned(NAME, "me")] == [session.id for session in mine]
        assert sessions.owned(NAME, "nobody") == []
        sessions.end(mine[1])
        assert len(sessions.owned(NAME, "me")) == 2


def test_sequences_are_the_clients_own_names(sessions_file: Path) -> None:
    with Sessions(sessions_file, SessionLimits()) as sessions:
        number = sessions.begin(NAME, 1, sequence=1)
        text = sessions.begin(NAME, 1, sequence="1")
        owned = sessions.begin(NAME, 1, sequence=1, owner="me")
        assert sessions.sequence(NAME, 1).id == number.id
        assert sessions.sequence(NAME, "1").id == text.id
        assert sessions.sequence(NAME, 1, "me").id == owned.id
        again = sessions.begin(NAME, 1, sequence=1)
        assert sessions.sequence(NAME, 1).id == again.id
        with pytest.raises(SessionExpired):
            sessions.get(NAME, number.id)
        for unknown in (2, "2", 2**64, ""):
            with pytest.raises(UnknownSession, match=r"never begun, ended or timed out"):
                sessions.sequence(NAME, unknown)
        with pytest.raises(UnknownSession):
            sessions.sequence("other", 1)


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_a_seed_out_of_range_is_refused(sessions_file: Path, seed: int) -> None:
    with Sessions(sessions_file, SessionLimits()) as sessions:
        with pytest.raises(InvalidRequest, match="expected a seed"):
            sessions.begin(NAME, 1, seed=seed)
        assert sessions.begin(NAME, 1, seed=MAX_SEED).seed == MAX_SEED
