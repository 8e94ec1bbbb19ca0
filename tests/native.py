"""Native code that does something as it is loaded, in a `.pt2` package."""

from __future__ import annotations

import io
import subprocess
import zipfile
from pathlib import Path

from actserve.store.artifact import Artifact

_HEADERS = "#include <fcntl.h>\n#include <signal.h>\n#include <stdlib.h>\n#include <unistd.h>\n"


def package_that(code: str, cart: Artifact, folder: Path) -> bytes:
    """The cart's package with a `.so` that does what `code`, in C, says as it is loaded. Built in `folder`."""
    (folder / "f.c").write_text(f"{_HEADERS}__attribute__((constructor)) void f(void) {{ {code} }}\n")
    library = folder / "f.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(folder / "f.c")], check=True)
    buffer = io.BytesIO()
    with zipfile.ZipFile(cart.folder / "policy.pt2") as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, library.read_bytes() if name.endswith(".so") else old.read(name))
    return buffer.getvalue()
