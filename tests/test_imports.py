"""The import law: which package may import which, no cycles, and what serving must not load.

An import counts wherever it stands: at the top of a module, inside a function, or as a string such as
"actserve.wire.as_json" or "actserve.engine.runtimes.onnx_runtime:OnnxRuntime".
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from actserve.store.local import ModelStore

ROOT = Path(__file__).parent.parent
SOURCES = {"actserve": ROOT / "app" / "actserve", "actserve_export": ROOT / "exporters" / "actserve_export"}
# A part imports itself and lower layers, and no other part of its own layer.
LAYERS: dict[str, list[set[str]]] = {
    "actserve": [
        {"core"},
        {"telemetry", "wire", "store"},
        {"engine", "client"},
        {"atari", "loadtest", "recording", "bundles"},
        {"server"},
        {"cli"},
    ],
    "actserve_export": [
        {"sources"},
        {"programs"},
        {"capture"},
        {"certify"},
        {"training"},
        {"targets", "publish", "compile", "recordings"},
        {"narrow", "bench", "demo"},
        {"cli"},
    ],
}
# Offline code uses the store, the engine's runtimes, recordings and the command line's options; it never serves.
EXPORTERS_MAY_IMPORT = {"core", "store", "engine", "recording"}
COMMANDS_MAY_IMPORT = EXPORTERS_MAY_IMPORT | {"cli", "atari", "client"}
COMMANDS = {"cli", "bench", "demo"}
MOST_PARTS, MOST_LAYERS = 14, 8


def modules() -> dict[str, Path]:
    """Every module of both packages, by its dotted name."""
    found: dict[str, Path] = {}
    for package, folder in SOURCES.items():
        for file in folder.rglob("*.py"):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules of ours that the module `name` imports."""
    return {found for found in _imports(ast.parse(MODULES[name].read_text())) if found != name}


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            named = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            named = [node.value.replace(":", ".")]
        else:
            continue
        for path in named:
            if path.partition(".")[0] in SOURCES and (found := _module(path)) is not None:
                yield found


def _module(path: str) -> str | None:
    """The module of a dotted path: the path itself, or the module that has it as an attribute."""
    while path not in MODULES:
        path, dot, _ = path.rpartition(".")
        if not dot:
            return None
    return path


@cache
def graph() -> dict[str, set[str]]:
    return {name: imports(name) for name in MODULES}


def part(name: str) -> str:
    """The part of its package that a module belongs to; "" for the package itself."""
    return [*name.split("."), ""][1]


def layer(name: str) -> int:
    package = name.partition(".")[0]
    for number, parts in enumerate(LAYERS[package]):
        if part(name) in parts:
            return number
    raise AssertionError(f"{name} is in no layer")


def inner(package: str) -> list[str]:
    return sorted(name for name in MODULES if name.partition(".")[0] == package and part(name) not in ("", "__main__"))


@pytest.mark.parametrize("name", inner("actserve"))
def test_actserve_imports_in_one_direction(name: str) -> None:
    for imported in graph()[name] - {"actserve"}:
        assert imported.startswith("actserve."), f"{name} imports {imported}: actserve never imports actserve_export"
        assert part(imported) == part(name) or layer(imported) < layer(name), f"{name} may not import {imported}"


@pytest.mark.parametrize("name", inner("actserve_export"))
def test_actserve_export_imports_in_one_direction(name: str) -> None:
    allowed = COMMANDS_MAY_IMPORT if part(name) in COMMANDS else EXPORTERS_MAY_IMPORT
    for imported in graph()[name] - {"actserve", "actserve_export"}:
        if imported.startswith("actserve."):
            assert part(imported) in allowed, f"{name} may not import {imported}"
        else:
            assert part(imported) == part(name) or layer(imported) < layer(name), f"{name} may not import {imported}"


def test_no_modules_import_each_other() -> None:
    within = {name: {found for found in names if found not in SOURCES} for name, names in graph().items()}
    try:
        list(TopologicalSorter(within).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("package", SOURCES)
def test_the_packages_are_few_parts_on_few_layers(package: str) -> None:
    parts = {part(name) for name in inner(package)}
    assert parts == set().union(*LAYERS[package])
    assert len(parts) <= MOST_PARTS
    assert len(LAYERS[package]) <= MOST_LAYERS


def test_the_contributing_guide_shows_the_tree() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    for package, folder in SOURCES.items():
        tree = guide.partition(f"{folder.relative_to(ROOT)}/\n")[2].partition("```")[0]
        tree = tree.partition("\n\n")[0]
        shown = {line.split()[0].rstrip("/").removesuffix(".py") for line in tree.splitlines() if line[:2] == "  "}
        missing = {part(name) for name in inner(package)} - shown
        assert not missing, f"CONTRIBUTING.md does not show {sorted(missing)} of {package}"


def test_only_one_file_imports_each_engine() -> None:
    for engine, home in (("onnxruntime", "onnx_runtime.py"), ("torch", "aoti_package.py")):
        users = {
            file.name
            for name, file in MODULES.items()
            if name.startswith("actserve.") and name != "actserve.bundles.python.policy"  # runs without us
            for node in ast.walk(ast.parse(file.read_text()))
            if (isinstance(node, ast.Import) and any(a.name.split(".")[0] == engine for a in node.names))
            or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == engine)
        }
        assert users == {home}


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return result.stdout.strip()


def test_users_import_from_the_top() -> None:
    assert run("from actserve import AsyncRemotePolicy, RemotePolicy, Stream; print(Stream.__name__)") == "Stream"
    code = "from actserve_export import OnnxSource, PolicySource, from_module, from_sb3; print(from_sb3.__name__)"
    assert run(code) == "from_sb3"


def test_the_service_and_the_client_load_no_torch() -> None:
    code = """
import sys
import actserve.atari.play, actserve.cli.main, actserve.loadtest.generator, actserve.server.app
import actserve.engine.runtimes.onnx_runtime
print(sorted({"torch", "torchrl", "tensordict", "actserve_export", "gymnasium"} & set(sys.modules)))
"""
    assert run(code) == "[]"


def test_a_wrong_name_is_told_before_torch_is_loaded() -> None:
    code = """
import sys
from actserve.core.errors import UsageError
from actserve_export.training.known import locate
from actserve_export.training.train import train

for ask in (lambda: locate("chess"), lambda: train("chess", out=None, total_frames=None, seed=0)):
    try:
        ask()
    except UsageError as error:
        print("chess" in str(error), "torch" in sys.modules)
"""
    assert run(code).split() == ["True", "False"] * 2


def test_the_service_loads_no_extra_unless_it_is_asked_for() -> None:
    code = """
import asyncio, sys
import actserve.cli.main, actserve.atari.play
from actserve.server.app import create_app
from actserve.core.settings import Settings

async def run(app):
    async with app.router.lifespan_context(app):
        extras = {"grpc", "tritonclient", "google.protobuf", "cryptography", "fsspec", "opentelemetry.sdk", "zmq"}
        print(sorted((extras | {"pyarrow"}) & set(sys.modules)))

asyncio.run(run(create_app(Settings(store="nowhere"))))
"""
    assert run(code) == "[]"


def test_native_code_that_is_refused_costs_no_engine(own_store: ModelStore) -> None:
    own_store.root.chmod(0o777)
    code = f"""
import sys
from pathlib import Path
from actserve.engine.policy import Policy
from actserve.core.settings import Settings
from actserve.store.local import ModelStore

policy = Policy.load(ModelStore(Path({str(own_store.root)!r})).resolve("cart"), Settings())
print(policy.choice.runtime, "torch" in sys.modules)
"""
    assert run(code) == "onnx False"
