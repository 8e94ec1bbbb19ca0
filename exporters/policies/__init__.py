"""The bundled policies: one file each, with the TorchRL modules and how they are trained. This table imports none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bundled:
    """Import paths, followed only when needed: see `app.lazy.resolve`.

    `factory` gives the `exporters.source.PolicySource`, with the weights that ship; `train`, by method, fills an
    `exporters.train.Run`. The first method is the default.
    """

    factory: str
    train: dict[str, str]


POLICIES = {
    "pong": Bundled(
        "exporters.policies.pong:pong",
        {"dqn": "exporters.policies.pong:train", "distill": "exporters.policies.distill:train"},
    ),
}
