"""Nothing is pickled or unpickled: not in the code, not in what an artifact holds, not while it is loaded and run.

(`actserve load` has child processes, to which `multiprocessing` speaks in pickles. They come from nowhere else.)
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from actserve.store.artifact import Artifact

ROOT = Path(__file__).parent.parent
MODULES = {
    "pickle", "_pickle", "cPickle", "pickletools", "cloudpickle", "dill", "joblib", "shelve", "marshal", "copyreg",
}  # fmt: skip
CALLS = {
    "torch.load", "torch.save", "torch.jit.load", "torch.jit.save", "torch.export.load", "torch.export.save",
    "torch.hub.load", "torch.package", "np.load", "numpy.load", "np.save", "numpy.save", "np.savez", "numpy.savez",
    "pd.read_pickle", "pandas.read_pickle",
}  # fmt: skip


def pickling(source: str) -> list[str]:
    """The places in Python code that pickle. An import or a string, as for `pkgutil.resolve_name`, names a module."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names):
                found += [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), names=names):
                found += [f"{module}.{alias.name}" for alias in names]
            case ast.Constant(str(text)):
                found.append(text.partition(":")[0])
            case ast.Attribute():
                found.append(ast.unparse(node))
            case ast.keyword(arg="allow_pickle", value=value) if ast.unparse(value) != "False":
                found.append("pickle")
            case _:
                pass
    return [name for name in found if name in CALLS or name.split(".")[0] in MODULES]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle as p", "from pickle import loads", "import dill, os", "resolve_name('pickle:loads')",
        "import_module('cloudpickle')", "torch.load(f)", "from torch import load", "x = torch.jit.load",
        "np.load(f)", "g(allow_pickle=True)", "def f():\n    import joblib.numpy_pickle",
    ],
)  # fmt: skip
def test_it_would_be_found(source: str) -> None:
    assert pickling(source)


@pytest.mark.parametrize(
    "file",
    sorted([*ROOT.glob("app/**/*.py"), *ROOT.glob("exporters/**/*.py")]),
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_no_code_pickles(file: Path) -> None:
    assert pickling(file.read_text()) == []


def test_only_one_file_opens_what_others_pickled() -> None:
    """Stable-Baselines3 pickles its models; its own code opens them, offline."""
    opens = [
        file.name
        for file in [*ROOT.glob("app/**/*.py"), *ROOT.glob("exporters/**/*.py")]
        if re.search(r"import load_from_(zip|pkl)", file.read_text())
    ]
    assert opens == ["sb3.py"]


def contents(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """A file; of an archive also its members, at any depth."""
    yield name, data
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                yield from contents(f"{name}/{member}", archive.read(member))


def is_pickle(name: str, data: bytes) -> bool:
    """By the opcode that every pickle since protocol 2 begins with, or by the names that torch gives them."""
    return bool(re.match(rb"\x80[\x02-\x05]", data)) or name.endswith((".pkl", ".pickle", ".pt"))


def test_an_artifact_holds_none(cart: Artifact) -> None:
    found = [item for name in cart.manifest.files for item in contents(name, cart.read(name))]
    assert len(found) > len(cart.manifest.files), "the .pt2 was looked into"
    assert [name for name, data in found if is_pickle(name, data)] == []


def test_none_is_read_while_an_artifact_is_loaded_and_run(cart: Artifact) -> None:
    """Python reports each class that an unpickler looks up, whatever library unpickles."""
    code = f"""
import io, pickle, sys
found = []
sys.addaudithook(lambda event, arguments: found.append(arguments) if event == "pickle.find_class" else None)
pickle.loads(b"cbuiltins\\nlist\\n.")
assert found.pop() == ("builtins", "list")
from pathlib import Path
from actserve.engine import golden
from actserve.engine.runtimes.load import load
from actserve.store.local import ModelStore
artifact = ModelStore(Path({str(cart.folder.parents[1])!r})).resolve("cart")
for runtime in ("onnx", "pt2"):
    assert golden.check(artifact, load(runtime, artifact).run).holds
print(found)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.stdout.strip() == "[]", result.stderr
