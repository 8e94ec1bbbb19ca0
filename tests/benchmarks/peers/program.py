"""The program that all peers run: the same .onnx in ONNX Runtime, with one thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

PROGRAM = os.environ.get("PROGRAM", "")
PORT = int(os.environ.get("PORT", "8000"))
BATCH = int(os.environ.get("BATCH", "1"))
SCREEN = (210, 160, 3)

Body = bytes | memoryview
Act = Callable[[Sequence[Body]], list[int]]  # raw screens -> their actions


def open_session(program: str) -> Any:
    """As actserve opens it, so that what differs is the serving."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(program, options, providers=["CPUExecutionProvider"])


def load(program: str = PROGRAM) -> Act:
    session = open_session(program)

    def act(bodies: Sequence[Body]) -> list[int]:
        whole = bodies[0] if len(bodies) == 1 else b"".join(bodies)
        pixels = np.frombuffer(whole, np.uint8).reshape(-1, *SCREEN)  # (B, 210, 160, 3) u8
        (actions,) = session.run(["action"], {"pixels": pixels})
        found: list[int] = actions.tolist()
        return found

    act([bytes(int(np.prod(SCREEN)))])  # the first call allocates
    return act
