"""`actserve train`: train a policy by its name."""

from __future__ import annotations

import logging
from pathlib import Path
from pkgutil import resolve_name

from actserve.core.errors import UsageError
from actserve_export.training.known import find_policy, known_names


def train(
    name: str, *, out: Path, total_frames: int | None, seed: int, resume: bool = True, method: str | None = None
) -> Path:
    """Train the policy `name` in the folder `out`; returns the file of the weights to export. Raises `UsageError`.

    `method` is one of the policy's training methods, by default its first.
    """
    known = find_policy(name)
    if known is None:
        raise UsageError(f"expected {known_names()}; got {name!r}")
    method = method or next(iter(known.train))
    if method not in known.train:
        raise UsageError(f"{name} can be trained by {', '.join(known.train)}; got {method!r}")
    from actserve_export.training.run import Run, draw  # torch: a wrong name is told at once

    logging.getLogger("torchrl").setLevel(logging.WARNING)  # its messages would break the progress line
    training = Run(out, total_frames, resume)
    resolve_name(known.train[method])(training, seed, *known.arguments)
    if (out / "history.csv").exists():
        draw(out / "history.csv", out / "curve.png", title=name)
    return training.weights
