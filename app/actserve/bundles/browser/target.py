"""Writes the files of a browser bundle, and verifies it in a headless Chromium."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actserve.bundles import ziggurat
from actserve.bundles.browser import onnxruntime_web
from actserve.bundles.browser.chromium import report
from actserve.core.errors import RuntimeFailure
from actserve.core.signature import Array
from actserve.store.artifact import Artifact

FILES = Path(__file__).with_name("files")
LIBRARY = "ort"  # the folder of onnxruntime-web


def write(_artifact: Artifact, _runtime: str, folder: Path) -> None:
    for file in sorted(FILES.iterdir()):
        (folder / file.name).write_bytes(file.read_bytes())
    tables = {"normal": ziggurat.normal(), "exponential": ziggurat.exponential()}
    lines = [
        "// The tables of numpy's ziggurats (Marsaglia and Tsang 2000): see noise.js.",
        *map(_table, *zip(*tables.items(), strict=True)),
    ]
    (folder / "ziggurat.js").write_text("\n".join(lines) + "\n")
    onnxruntime_web.write(folder / LIBRARY)


def _table(name: str, table: ziggurat.Ziggurat) -> str:
    arrays = {"inside": table.inside, "width": table.width, "density": table.density}
    listed = ",\n".join(f"  {key}: {_typed(array)}" for key, array in arrays.items())
    return f"export const {name} = {{\n  tail: {table.tail!r},\n{listed},\n}};"


def _typed(array: Array) -> str:
    kind = {"uint32": "Uint32Array", "float32": "Float32Array"}[array.dtype.name]
    return f"new {kind}([{', '.join(map(str, array.tolist()))}])"


def verify(folder: Path, _runtime: str) -> dict[str, str]:
    """One thread, then two."""
    found: dict[str, Any] = {}
    for threads in (1, 2):
        found = report(folder, f"threads={threads}")
        if "error" in found:
            raise RuntimeFailure(f"not verified in the browser, with {threads} threads: {found['error']}"[:500])
    browser = next(part for part in found["browser"].split() if "Chrome/" in part).partition("/")[2]
    return {"Chromium": browser, "onnxruntime-web": onnxruntime_web.VERSION}
