"""The child process of `probe`: loads a `.pt2` package, runs it on zeros, and prints the parent's token.

Standard input is a JSON object: `path`, `token`, `device`, `inputs` (dtype and shape of one item each), `sizes`
(batch sizes to run). The last line of standard output is the token; after a failure, the error follows it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np

from actserve.engine.runtimes.aoti_package import call, open_package
from actserve.engine.runtimes.base import brief


def main(task: dict[str, Any]) -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        package = open_package(Path(task["path"]), task["device"])
        for size in task["sizes"]:
            call(package, [np.zeros((size, *shape), dtype) for dtype, shape in task["inputs"]], task["device"])
    except Exception as error:
        print(f"\n{task['token']} {brief(error)}", flush=True)
        return 1
    print(f"\n{task['token']}", flush=True)
    os._exit(0)  # skip destructors: a crash in torch's teardown is not the program's fault


if __name__ == "__main__":
    sys.exit(main(json.load(sys.stdin)))
