"""`/bundles`: folders of `actserve bundle --target browser`, whose policies act in the browser on the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.staticfiles import StaticFiles

from actserve.core.errors import StoreError, UsageError
from actserve.store.artifact import MANIFEST, MANIFEST_LIMIT_BYTES, Manifest, read_plain

router = APIRouter(tags=["page"])

ENTRY = "policy.js"


def check(folder: Path) -> None:
    """Raises `UsageError` if there is no such folder, or no bundle in it."""
    if not folder.is_dir():
        raise UsageError(f"expected --bundles to be a folder of browser bundles; there is none at {folder}")
    if not found(folder):
        raise UsageError(f"expected bundles of `actserve bundle --target browser` in folders of {folder}; got none")


def found(folder: Path) -> dict[str, Manifest]:
    """The manifest of each bundle, by the name of its folder; what is no bundle for browsers is left out."""
    bundles = {}
    for file in sorted(folder.glob(f"*/{ENTRY}")):
        try:
            data = read_plain(file.with_name(MANIFEST), MANIFEST_LIMIT_BYTES + 1)
            bundles[file.parent.name] = Manifest.from_json(data, file.parent.name)
        except (OSError, StoreError):
            continue
    return bundles


@router.get("/bundles")
async def bundles(request: Request) -> dict[str, Any]:
    """The policies that can act in the browser: name, version, and the path of the module."""
    folder: Path | None = request.app.state.settings.bundles
    listed = found(folder).items() if folder is not None else ()
    return {
        "bundles": [
            {"name": manifest.name, "version": manifest.version, "module": f"bundles/{name}/{ENTRY}"}
            for name, manifest in listed
        ]
    }


def install(app: FastAPI, folder: Path) -> None:
    """Serve the files of the bundles."""
    app.mount("/bundles", StaticFiles(directory=folder))
