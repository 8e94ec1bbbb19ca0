"""The package as users get it: a wheel in an environment of its own, and beside a project with packages like ours."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from actserve.cli.tools.local_service import free_port
from tests.shipped import SHIPPED
from tests.waiting import until

ROOT = Path(__file__).parent.parent.parent
TAKEN = ("app", "exporters", "core", "client", "server")  # names that a project of a user's is likely to have
POLICY = """
import torch
from tensordict import TensorDict
from torchrl.data import Categorical
from torchrl.modules import MLP, QValueActor

def small():
    torch.manual_seed(0)
    network = MLP(in_features=4, out_features=2, num_cells=[8])
    policy = QValueActor(network, in_keys=["observation"], spec=Categorical(2))
    return policy, TensorDict({"observation": torch.zeros(4)})
"""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=600, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("app", "exporters"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (built,) = folder.glob("*.whl")
    return built


def test_a_wheel_holds_our_two_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"actserve", "actserve_export"}
    assert {"actserve/web/index.html", "actserve_export/cli.py"} <= set(names)


def test_an_environment_with_the_base_dependencies_serves_onnx(wheel: Path, tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    venv.create(tmp_path / "venv", with_pip=True)
    constraints = ROOT / ".ci" / "constraints.txt"
    run(python, "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", constraints, wheel)
    assert "actserve_export" not in run(python, "-m", "pip", "list")
    port = free_port()
    command = [python, "-m", "actserve", "serve", "--store", SHIPPED, "--port", str(port)]
    service = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stderr=subprocess.PIPE)
    try:
        asking = f"""
import json, numpy as np, sys
from actserve import RemotePolicy
with RemotePolicy("http://127.0.0.1:{port}", "pong") as policy:
    print(json.dumps([policy.act(screen) for screen in np.load(sys.argv[1])]))
"""
        golden = load_file(SHIPPED / "pong" / "1" / "golden.safetensors")
        np.save(tmp_path / "screens.npy", golden["input.pixels"])
        until(lambda: service.poll() is not None or _is_ready(python, port, tmp_path))
        assert service.poll() is None, service.stderr and service.stderr.read().decode()
        answered = json.loads(run(python, "-c", asking, tmp_path / "screens.npy", cwd=tmp_path))
        assert answered == golden["output.action"].tolist()
    finally:
        service.terminate()
        service.communicate(timeout=60)


def _is_ready(python: Path, port: int, folder: Path) -> bool:
    code = f"from urllib.request import urlopen; urlopen('http://127.0.0.1:{port}/readyz')"
    return subprocess.run([python, "-c", code], cwd=folder, check=False, capture_output=True).returncode == 0


def test_a_project_may_have_packages_of_any_name(tmp_path: Path) -> None:
    for name in TAKEN:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "policy.py").write_text(POLICY)
    exported = run(
        sys.executable, "-m", "actserve", "export", "app.policy:small", "--runtime", "onnx", "--json", cwd=tmp_path
    )
    assert json.loads(exported)["published"]
    finding = f"""
from actserve_export.targets import find_source
import sys
for name in {TAKEN}:
    _, source = find_source(f"{{name}}.policy:small")
    print(sys.modules[f"{{name}}.policy"].__file__, tuple(source.policy.in_keys))
"""
    found = run(sys.executable, "-c", finding, cwd=tmp_path).splitlines()
    assert found == [f"{tmp_path / name / 'policy.py'} ('observation',)" for name in TAKEN]
