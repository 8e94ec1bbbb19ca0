"""Write `pong` as the tutorial exports it, without our rewrites. Run: python -m tests.benchmarks.tutorial FILE.onnx"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from exporters.capture import capture
from exporters.policies.pong import pong
from exporters.programs import onnx


def main() -> None:
    torch.set_num_threads(1)
    onnx.build(capture(pong()), Path(sys.argv[1]))


if __name__ == "__main__":
    main()
