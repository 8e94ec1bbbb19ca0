"""Write `pong` as the tutorial exports it, without our rewrites. Run: python -m tests.benchmarks.tutorial FILE.onnx"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from actserve_export.capture import capture
from actserve_export.programs import onnx
from actserve_export.training import bundled


def main() -> None:
    torch.set_num_threads(1)
    captured = capture(bundled.policy("pong"))
    onnx.convert_program(captured.program, captured.signature, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
