"""The most frames a second that PCIe and arithmetic allow."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.gpu.batches import finish, seconds_per_call

COPIED_BYTES = 64 << 20
MATRIX = {"cpu": 512, "cuda": 8192}  # rows: large enough for the device's full rate


def copy_rate(device: str, pinned: bool, seconds: float) -> float:
    """Bytes a second from host memory to `device`."""
    host = torch.zeros(COPIED_BYTES, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)

    def copy() -> None:
        target.copy_(host, non_blocking=pinned)
        finish(device)

    return COPIED_BYTES / seconds_per_call(copy, seconds)


def matrix_rate(device: str, seconds: float) -> float:
    """Floating-point operations a second of a large product in float32."""
    rows = MATRIX[device]
    left, right = (torch.randn(rows, rows, device=device) for _ in range(2))

    def multiply() -> None:
        torch.mm(left, right)
        finish(device)

    return 2 * rows**3 / seconds_per_call(multiply, seconds)


def operations_per_frame(program: torch.export.ExportedProgram, frame: torch.Tensor) -> int:
    """Floating-point operations of convolutions and products for one `frame` (1, *shape)."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        program.module()(frame)
    return int(counter.get_total_flops())


def launch_s(device: str, seconds: float) -> float | None:
    """Seconds to start an empty kernel and wait for it: the least that a call takes. None on a CPU."""
    if device == "cpu":
        return None
    one = torch.zeros(1, device=device)

    def add() -> None:
        one.add_(1)
        finish(device)

    return seconds_per_call(add, seconds)
