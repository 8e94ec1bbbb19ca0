"""`actserve …` as a user types it, in this process: importing torch anew takes a process 5 s."""

from __future__ import annotations

import io
import os
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from actserve.cli.main import main

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def actserve(*arguments: str, cwd: Path = ROOT) -> Done:
    """Run a command in the folder `cwd`, and wait for its end. Modules are found in `cwd` first."""
    out, err = io.StringIO(), io.StringIO()
    with (
        chdir(cwd),
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", ["actserve", *arguments]),
        patch.object(sys, "path", [str(cwd), *sys.path]),
        patch.dict(os.environ),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int), code
    return Done(code, out.getvalue(), err.getvalue())
