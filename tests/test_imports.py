"""The direction of the code: who may import whom, and what serving must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from app.store import ModelStore

ROOT = Path(__file__).parent.parent
# Each may import itself and what stands before it.
ORDER = [
    "ready", "errors", "lazy", "environment", "atari", "signature", "trust", "artifact", "cache", "store", "requests",
    "wire", "settings", "supervisor", "access", "telemetry", "runtimes", "golden", "tuning", "batcher", "policy",
    "memory", "registry", "sessions", "metrics", "game", "api", "lane", "grpc", "admin", "main", "worker", "scale",
    "client", "tools", "commands", "cli", "__main__",
]  # fmt: skip
CLIENT_MAY_IMPORT = {"errors", "lazy", "environment", "atari", "signature", "requests", "wire", "client"}
EXPORTERS_MAY_IMPORT = {"errors", "lazy", "environment", "signature", "artifact", "store", "golden", "requests"}


def imports(file: Path) -> set[str]:
    """The modules of ours that a file imports anywhere in it, as dotted names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                f"{node.module}.{alias.name}" if node.module in ("app", "exporters") else node.module
                for alias in node.names
            }
    return {name for name in found if name.split(".")[0] in ("app", "exporters")}


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def part(file: Path) -> str:
    return file.relative_to(ROOT / "app").parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", files("app"), ids=lambda file: str(file.relative_to(ROOT)))
def test_app_imports_in_one_direction(file: Path) -> None:
    if file.parent.name == "app" and file.name == "__init__.py":
        return
    mine = part(file)
    allowed = set(ORDER[: ORDER.index(mine) + 1]) | {"__version__"}
    if mine == "client":
        allowed = CLIENT_MAY_IMPORT
    for name in imports(file):
        assert name.startswith("app."), f"{file.name} imports {name}: app never imports exporters"
        assert name.split(".")[1] in allowed, f"{mine} may not import {name}"


@pytest.mark.parametrize("file", files("exporters"), ids=lambda file: str(file.relative_to(ROOT)))
def test_exporters_import_little_of_app(file: Path) -> None:
    allowed = EXPORTERS_MAY_IMPORT | {"__version__"}
    if file.name in ("certify.py", "publish.py", "compile.py", "int8.py"):
        allowed = allowed | {"runtimes"}
    for name in imports(file):
        assert name.startswith("exporters") or name.split(".")[1] in allowed, f"{file.name} may not import {name}"


def test_only_one_file_imports_each_engine() -> None:
    for engine, home in (("onnxruntime", "onnx.py"), ("torch", "aoti.py")):
        users = {
            file.name
            for file in files("app")
            for node in ast.walk(ast.parse(file.read_text()))
            if (isinstance(node, ast.Import) and any(a.name.split(".")[0] == engine for a in node.names))
            or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == engine)
        }
        assert users == {home}


def test_the_service_and_the_client_load_no_torch() -> None:
    code = (
        "import sys, app.main, app.cli, app.runtimes.onnx, app.client.play, app.client.load;"
        "print(sorted({'torch', 'torchrl', 'tensordict', 'exporters', 'gymnasium'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_the_service_loads_no_extra_unless_it_is_asked_for() -> None:
    code = """
import asyncio, sys
import app.cli, app.client.play
from app.main import create_app
from app.settings import Settings

async def run(app):
    async with app.router.lifespan_context(app):
        extras = {"grpc", "tritonclient", "google.protobuf", "cryptography", "fsspec", "opentelemetry.sdk"}
        print(sorted(extras & set(sys.modules)))

asyncio.run(run(create_app(Settings(store="nowhere"))))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_native_code_that_is_refused_costs_no_engine(own_store: ModelStore) -> None:
    own_store.root.chmod(0o777)
    code = f"""
import sys
from pathlib import Path
from app.policy import Policy
from app.settings import Settings
from app.store import ModelStore

policy = Policy.load(ModelStore(Path({str(own_store.root)!r})).resolve("cart"), Settings())
print(policy.choice.runtime, "torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "onnx False"
