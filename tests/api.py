"""The Python API's reference, from docstrings: what users import.

python -m tests.api build/api writes it.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pdoc
from pdoc.doc import Class, Doc, Function, Module

import actserve_export

PROTOCOLS = "actserve.server.protocols"  # without its modules, except those that are named
MODULES = (
    "actserve.client.remote_policy",
    "actserve.client.async_remote_policy",
    "actserve.client.stream",
    "actserve.client.sequence",
    "actserve_export",
    "actserve.core.signature",
    "actserve.store.artifact",
    "actserve.store.local",
    "actserve.core.settings",
    "actserve.core.errors",
    "actserve.server.app",
    PROTOCOLS,
    "actserve.server.protocols.ports",
    "actserve.server.protocols.robots.episode",
    "actserve.server.protocols.robots.socket",
)


def build(folder: Path) -> None:
    """A page for each module, and an index."""
    _bring_in()
    others = [module for module in MODULES if module != PROTOCOLS]
    pdoc.pdoc(PROTOCOLS, f"!{re.escape(PROTOCOLS)}\\.", *others, output_directory=folder)


def documented(module: str) -> Iterator[tuple[str, str]]:
    """Each public class, function and method of `module` that is written there, and its own docstring."""
    _bring_in()
    yield from _members(Module(sys.modules.get(module) or __import__(module, fromlist=["*"])))


def _bring_in() -> None:
    """pdoc does not see the names that `actserve_export` imports at their first use."""
    for name in actserve_export.__all__:
        setattr(actserve_export, name, getattr(actserve_export, name))


def _members(of: Module | Class) -> Iterator[tuple[str, str]]:
    for name, member in of.members.items():
        if name.startswith("_") or isinstance(member, Module) or _elsewhere(member, of):
            continue
        if isinstance(member, Class):
            own = member.docstring if member.obj.__dict__.get("__doc__") else ""
            yield member.fullname, own.strip()
            yield from _members(member)
        elif isinstance(member, Function):
            yield member.fullname, (inspect.getdoc(member.obj) or "").strip()


def _elsewhere(member: Doc[object], of: Module | Class) -> bool:
    return isinstance(of, Class) and member.taken_from[1].rpartition(".")[0] != of.qualname


if __name__ == "__main__":
    build(Path(sys.argv[1]))
