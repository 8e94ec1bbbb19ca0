"""The child process of `probe`: loads a `.pt2` package, runs it, and prints the parent's token.

Standard input is a JSON object: `path`, `token`, `device`, `inputs` (dtype, shape and base64 of one item each), `sizes`
(batch sizes to run: so many copies of the item). The last line of standard output is the token; after a failure, the
error follows it.
"""

from __future__ import annotations

import base64
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np

from actserve.core.signature import Array
from actserve.engine.runtimes.aoti_package import call, open_package
from actserve.engine.runtimes.base import brief


def main(task: dict[str, Any]) -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        package = open_package(Path(task["path"]), task["device"])
        for size in task["sizes"]:
            call(package, [_copies(size, *item) for item in task["inputs"]], task["device"])
    except Exception as error:
        print(f"\n{task['token']} {brief(error)}", flush=True)
        return 1
    print(f"\n{task['token']}", flush=True)
    os._exit(0)  # skip destructors: a crash in torch's teardown is not the program's fault


def _copies(size: int, dtype: str, shape: list[int], data: str) -> Array:
    item: Array = np.frombuffer(base64.b64decode(data), dtype).reshape(1, *shape)
    return item.repeat(size, 0)


if __name__ == "__main__":
    sys.exit(main(json.load(sys.stdin)))
