"""Administration of a real service, and what its ordinary routes and commands make of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import urllib3

from actserve.cli.tools import local_service as local
from actserve.core.errors import UsageError
from actserve.core.settings import Settings
from actserve.server import admin
from actserve.store import routing
from actserve.store.local import ModelStore
from actserve.store.routing import Routing
from tests.command_line import actserve
from tests.variants import Variants
from tests.waiting import until

TOKEN = "a token of more than 16 characters"
ACT = "/policies/cart/act"


@dataclass(frozen=True)
class Service:
    url: str
    admin_url: str
    variants: Variants
    http: urllib3.PoolManager

    def ask(self, method: str, path: str, document: Any = None, token: str | None = TOKEN) -> tuple[int, Any]:
        """The status and the JSON of a request to the administration."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        answer = self.http.request(method, self.admin_url + path, json=document, headers=headers)
        return answer.status, json.loads(answer.data)

    def change(self, method: str, path: str, document: Any = None) -> Any:
        status, answered = self.ask(method, f"/policies/cart/{path}", document)
        assert status == 200, answered
        return answered

    def version(self, path: str = ACT) -> int:
        """Which version acts, modulo 3."""
        body = self.variants.observations[0].tobytes()
        headers = {"Content-Type": "application/octet-stream"}
        answer = self.http.request("POST", self.url + path, body=body, headers=headers)
        assert answer.status == 200, answer.data
        difference: int = answer.json()["action"] - self.variants.episode(1)[0]
        return difference % self.variants.actions


@pytest.fixture
def variants(cart_store: ModelStore, tmp_path: Path) -> Variants:
    """`cart` in versions 1 and 2 in a store of its own."""
    made = Variants(cart_store.resolve("cart"), ModelStore(tmp_path / "store"))
    made.publish()
    made.publish()
    return made


@pytest.fixture(params=[()], ids=["one worker"])
def service(request: pytest.FixtureRequest, variants: Variants) -> Iterator[Service]:
    """One that looks at the store when it is told to, or, with several workers, all the time."""
    port = local.free_port()
    poll_s = "0.1" if request.param else "3600"
    environment = {**os.environ, "ACTSERVE_ADMIN_TOKEN": TOKEN, "ACTSERVE_POLL_S": poll_s}
    options = ("--runtime", "onnx", "--admin-port", str(port), *request.param)
    with (
        local.serve(variants.store.root, *options, environment=environment) as running,
        urllib3.PoolManager(retries=False) as http,
    ):
        yield Service(running.url, f"http://127.0.0.1:{port}", variants, http)


def test_an_administrator_says_who_acts(service: Service) -> None:
    assert service.version() == 2
    assert service.variants.publish() == 3
    assert service.version() == 2
    status, answered = service.ask("POST", "/load")
    assert (status, answered["policies"][0]["version"]) == (200, 3)
    assert "manifest" not in answered["policies"][0]
    assert service.version() == 3 % 3

    assert service.change("POST", "rollback")["version"] == 2
    assert service.version() == 2
    assert service.change("PUT", "pin", {"version": 1})["version"] == 1
    assert service.version() == 1
    assert service.change("DELETE", "pin")["version"] == 3

    assert service.change("PUT", "aliases/champion", {"version": 2})["routing"]["aliases"] == {"champion": 2}
    assert service.version("/policies/cart/versions/champion/act") == 2
    service.change("DELETE", "aliases/champion")
    missing = service.http.request("POST", f"{service.url}/policies/cart/versions/champion/act")
    assert (missing.status, missing.json()["error"]["code"]) == (404, "unknown_version")

    service.change("PUT", "canary", {"version": 1, "share": 0.5})
    assert [service.version() for _ in range(6)] == [0, 1] * 3
    service.change("DELETE", "canary")
    assert [service.version() for _ in range(4)] == [0] * 4

    service.change("PUT", "shadow", {"version": 1})
    assert [service.version() for _ in range(3)] == [0] * 3
    until(lambda: service.ask("GET", "/policies")[1]["policies"][0]["routing"]["shadow"]["disagreements"] == 3)
    assert service.change("DELETE", "shadow")["routing"]["shadow"] is None


def test_nobody_gets_in_without_the_token(service: Service) -> None:
    for token in (None, "", TOKEN[:-1], TOKEN + "x"):
        for method, path in (("GET", "/policies"), ("POST", "/load"), ("PUT", "/policies/cart/pin")):
            status, answered = service.ask(method, path, {"version": 1}, token)
            assert (status, answered["error"]["code"]) == (401, "unauthorized")
            assert TOKEN not in json.dumps(answered)
        assert service.ask("GET", "/docs", token=token)[0] == 404
    assert routing.read(service.variants.store.root, "cart") is None
    assert service.http.request("POST", f"{service.url}/load").status == 404, "not on the service's own port"


def test_what_cannot_be_is_refused(service: Service) -> None:
    for path, document, status, code in (
        ("cart/pin", {"version": 9}, 404, "unknown_version"),
        ("nobody/pin", {"version": 1}, 404, "unknown_policy"),
        ("cart/pin", {"version": "1"}, 422, "invalid_request"),
        ("cart/pin", {}, 422, "invalid_request"),
        ("cart/aliases/7", {"version": 1}, 422, "invalid_request"),
        ("cart/canary", {"version": 1, "share": 1.5}, 422, "invalid_request"),
    ):
        answered = service.ask("PUT", f"/policies/{path}", document)
        assert (answered[0], answered[1]["error"]["code"]) == (status, code), path
    assert service.version() == 2


@pytest.mark.parametrize("service", [("--workers", "2")], indirect=True, ids=["two workers"])
def test_all_workers_follow_the_administrator_and_the_commands(service: Service) -> None:
    def all_say(version: int) -> bool:
        """Each request on a connection of its own, which any worker may get."""
        seen = set()
        for _ in range(12):
            service.http.clear()
            seen.add(service.version())
        return seen == {version}

    def all_ready() -> bool:
        """The fixture has waited for one of them."""
        answers = []
        for _ in range(12):
            service.http.clear()
            answers.append(service.http.request("GET", f"{service.url}/readyz").status)
        return set(answers) == {200}

    until(all_ready)
    service.change("PUT", "pin", {"version": 1})
    until(lambda: all_say(1))
    store = ("--store", str(service.variants.store.root))
    done = actserve("pin", "cart", *store)
    assert (done.returncode, done.stdout) == (0, "cart serves its highest version\n"), done.stderr
    until(lambda: all_say(2))
    assert actserve("rollback", "cart", *store).stdout == "cart serves version 1\n"
    until(lambda: all_say(1))


def test_the_commands_write_what_the_service_reads(variants: Variants) -> None:
    store = ("--store", str(variants.store.root))
    for command in (("pin", "1"), ("alias", "champion", "1"), ("canary", "2", "--share", "0.2"), ("shadow", "2")):
        verb, *rest = command
        done = actserve(verb, "cart", *rest, *store)
        assert done.returncode == 0, done.stderr
    expected = {"pin": 1, "aliases": {"champion": 1}, "canary": {"version": 2, "share": 0.2}, "shadow": 2}
    assert routing.read(variants.store.root, "cart") == Routing.model_validate(expected)
    done = actserve("alias", "cart", "champion", "2", *store)
    assert done.stdout.splitlines() == [
        "cart serves version 1",
        "  champion is version 2",
        "  version 2 answers 20% of the requests",
        "  version 2 runs as the shadow: its actions are only compared",
    ]
    done = actserve("alias", "cart", "champion", "1", "--json", *store)
    assert json.loads(done.stdout) == {"name": "cart", **expected}
    refused = actserve("pin", "cart", "7", *store)
    assert (refused.returncode, refused.stderr) == (1, "error: cart has no version '7'; known: 1, 2\n")


def test_administration_is_off_without_a_token_or_a_free_port(variants: Variants) -> None:
    admin.check(Settings())
    with pytest.raises(UsageError, match="ACTSERVE_ADMIN_TOKEN"):
        admin.check(Settings(admin_port=1))
    listening = admin._listen(local.free_port())
    with listening, pytest.raises(UsageError, match="Address already in use"):
        admin.check(Settings(admin_port=listening.getsockname()[1], admin_token=TOKEN))
    assert TOKEN not in repr(Settings(admin_token=TOKEN))
