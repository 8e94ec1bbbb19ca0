"""The process that libFuzzer drives for `tests.benchmarks.fuzz`: the decoders, watched for the code that they reach.

The first byte of an input says which decoder it is for.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=[
        "actserve.wire",
        "actserve.server.protocols.oip.codec",
        "actserve.server.protocols.oip.infer_request",
        "actserve.server.fastpath",
        "actserve.server.access.tokens",
    ]
):
    from actserve.core.errors import ActserveError
    from tests.fuzzing import GUIDED, targets


def main() -> None:
    found = targets(Path(sys.argv[-1]).parent)  # where the corpus is, the last argument
    decoders = [found[name][0] for name in GUIDED]

    def decode(data: bytes) -> None:
        if data:
            with suppress(ActserveError):
                decoders[data[0] % len(decoders)](data[1:])

    atheris.Setup(sys.argv, decode)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
