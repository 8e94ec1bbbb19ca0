"""The extension point: protocols of other packages, and what is wrong with them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import invalidate_caches
from pathlib import Path

import pytest
from fastapi import APIRouter

from actserve.core.errors import UsageError
from actserve.core.settings import Settings
from actserve.server import protocols
from actserve.server.app import check, create_app
from tests.asgi import Caller
from tests.shipped import SHIPPED

OURS = {"streams", "Open Inference Protocol", "Open Inference Protocol over gRPC"}
HELLO = """
from contextlib import asynccontextmanager
from fastapi import APIRouter, Request
from actserve.server.protocols import Protocol, service_of

router = APIRouter()
served = []

@router.get("/hello")
async def hello(request: Request):
    return service_of(request).registry.names

@asynccontextmanager
async def serving(service):
    served.append(service.settings.store)
    yield
    served.append("closed")

protocol = Protocol("hello", routers=[router], serving=serving)

def make():
    return protocol

def broken():
    raise RuntimeError("no camera")
"""


class Package:
    """An installed package of somebody else, `install`ed with one entry point."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def install(self, value: str, code: str = HELLO, package: str = "robotics") -> None:
        (self._folder / f"{package}_wire.py").write_text(code)
        info = self._folder / f"{package}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[{protocols.GROUP}]\nhello = {value}\n")
        invalidate_caches()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    monkeypatch.syspath_prepend(tmp_path)
    yield Package(tmp_path)
    for name in [name for name in sys.modules if name.endswith("_wire")]:
        del sys.modules[name]


def test_our_protocols_are_on_the_same_point() -> None:
    assert {protocol.name for protocol in protocols.load()} >= OURS


@pytest.mark.parametrize("name", ["protocol", "make"])
def test_a_protocol_of_another_package_is_served(package: Package, name: str) -> None:
    package.install(f"robotics_wire:{name}")
    with Caller(create_app(Settings(store=str(SHIPPED), runtime="onnx"))) as call:
        assert call("GET", "/hello").status == 200
        assert call("GET", "/v2").status == 200
        assert sys.modules["robotics_wire"].served == [str(SHIPPED)]
    assert sys.modules["robotics_wire"].served == [str(SHIPPED), "closed"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            "nowhere_wire:protocol",
            r"the protocol 'hello' of the package robotics cannot be loaded .*: No module",
        ),
        ("robotics_wire:missing", "cannot be loaded .* has no attribute 'missing'"),
        ("robotics_wire:broken", "cannot be loaded .*: no camera; update or uninstall it"),
        ("robotics_wire:HTTP", "expected a Protocol; got str"),
    ],
)
def test_what_is_wrong_with_a_package_is_told_at_the_start(package: Package, value: str, expected: str) -> None:
    package.install(value, HELLO + "\nHTTP = 'text'\n")
    with pytest.raises(UsageError, match=expected):
        create_app(Settings(store=str(SHIPPED)))
    with pytest.raises(UsageError, match=expected):
        check(Settings(store=str(SHIPPED)))


def test_a_name_is_given_once(package: Package) -> None:
    package.install("robotics_wire:protocol")
    package.install("arms_wire:protocol", package="arms")
    with pytest.raises(UsageError, match="two protocols have the name 'hello', of the packages arms and robotics"):
        protocols.load()


def test_a_checkout_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocols, "entry_points", lambda group: ())
    with pytest.raises(UsageError, match="install it again"):
        protocols.load()


def test_settings_are_checked_by_each_protocol() -> None:
    def refuse(settings: Settings) -> None:
        raise UsageError("no such robot")

    fine = protocols.Protocol("fine", routers=[APIRouter()])
    with pytest.raises(UsageError, match="no such robot"):
        protocols.check([fine, protocols.Protocol("picky", check=refuse)], Settings())
