"""`actserve bundle`, and `actserve verify --bundle`: policies that run without the service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from actserve.bundles import Runtime, Target
from actserve.cli.stores import DEFAULT_STORE, Label, Store, find, open_for_reading
from actserve.cli.terminal import Json, console, print_json, steps
from actserve.core.errors import NotFound, StoreError

if TYPE_CHECKING:
    from actserve.bundles.bundle import Verified
    from actserve.store.artifact import Artifact


def bundle(
    label: Label,
    target: Annotated[
        Target,
        typer.Option(help="browser: static files. cpp: a CMake project. python: one file, with numpy and onnxruntime."),
    ],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="New folder; default: NAME-TARGET.")] = None,
    runtime: Annotated[Runtime, typer.Option(help="Program of the bundle; pt2 for cpp only.")] = "onnx",
    store: Store = DEFAULT_STORE,
    json: Json = False,
) -> None:
    """Write a folder that acts without the service: a web page, a C++ project or a Python file."""
    from actserve.bundles import bundle as bundles

    artifact = find(open_for_reading(store), label)
    folder = out or Path(f"{artifact.manifest.name}-{target}")
    with steps(f"writing {folder}"):
        files = bundles.write(artifact, target, runtime, folder)
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    if json:
        print_json(
            {"policy": artifact.label, "target": target, "runtime": runtime, "folder": str(folder), "files": sizes}
        )
        return
    print(f"{artifact.label} (.{runtime}) for {target} in {folder}: {sum(sizes.values()) / 1e6:.1f} MB")
    for name, size in sizes.items():
        print(f"  {size:>12,}  {name}")
    print(f"verify it where it runs: actserve verify --bundle {folder}")


def _note(artifact: Artifact, verified: Verified) -> None:
    from actserve.bundles import bundle as bundles

    try:
        bundles.note(artifact, verified)
    except StoreError as error:  # the bundle is right all the same
        console().print(f"the store does not remember it: {error.message}", soft_wrap=True, markup=False)


def verify_bundle(folder: Path, store: str, json: bool) -> None:
    """Run the bundle's golden samples with its own code. A store in a folder remembers it, if it has the artifact."""
    from actserve.bundles import bundle as bundles

    with steps(f"verifying {folder}"):
        manifest, verified = bundles.verify(folder)
    label = f"{manifest.name}@{manifest.version}"
    if "://" not in store:
        try:
            artifact = find(open_for_reading(store), label)
        except NotFound:
            pass
        else:
            if artifact.manifest == manifest:
                _note(artifact, verified)
    if json:
        print_json({"policy": label, "holds": True, **vars(verified)})
    else:
        print(f"{label}: the golden samples are repeated by {verified}")
