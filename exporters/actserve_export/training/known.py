"""The policies that `actserve train` and `export` know by name, and what else can be exported. Imports none of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ale_py import roms

from actserve.core.errors import UsageError

FILES = {".zip": "actserve_export.sources.sb3:from_sb3", ".onnx": "actserve_export.sources.onnx_source:OnnxSource"}


@dataclass(frozen=True)
class KnownPolicy:
    """A policy's factory and its training methods, as names for `pkgutil.resolve_name`.

    `factory(*arguments)` returns a `PolicySource`. Each function in `train`, by method, is called with a `Run`, a seed
    and `arguments`, and fills the run. The first method is the default.
    """

    factory: str
    train: dict[str, str]
    arguments: tuple[str, ...] = ()
    weights_ship: bool = True


_GAME = {
    "distill": "actserve_export.training.distill:train",
    "dqn": "actserve_export.training.dqn:train",
}
_BUNDLED_GAME = _GAME | {"improve": "actserve_export.training.distill:improve"}

BUNDLED = {
    "pong": KnownPolicy("actserve_export.training.bundled:policy", _BUNDLED_GAME, ("pong",)),
    "pong-lstm": KnownPolicy(
        "actserve_export.training.pong_lstm:pong_lstm",
        {
            "distill": "actserve_export.training.distill:train_recurrent",
            "improve": "actserve_export.training.distill:improve_recurrent",
        },
    ),
    "boxing": KnownPolicy("actserve_export.training.bundled:policy", _BUNDLED_GAME, ("boxing",)),
}


def find_policy(name: str) -> KnownPolicy | None:
    """A bundled policy; for any other game of ale-py, the tutorial's network, whose weights do not ship; else None."""
    game = name.replace("-", "_")
    if name in BUNDLED or game not in roms.get_all_rom_ids():
        return BUNDLED.get(name)
    return KnownPolicy("actserve_export.training.atari:source", _GAME, (game,), weights_ship=False)


def known_names() -> str:
    """The names that `find_policy` knows, for error messages."""
    return f"{', '.join(BUNDLED)}, a game of ale-py (breakout, …)"


def locate(target: str, checkpoint: Path | None = None) -> str:
    """The factory of a target, "module:object", or its file. Raises `UsageError` for what can be neither."""
    if Path(target).suffix in FILES:
        if not Path(target).is_file():
            raise UsageError(f"there is no file {target}")
        return target
    known = find_policy(target)
    path = known.factory if known else target
    if not path.partition(":")[2]:
        raise UsageError(f"expected {known_names()}, module:factory, or a file ({', '.join(FILES)}); got {target!r}")
    if known and not known.weights_ship and checkpoint is None:
        raise UsageError(
            f"no weights of {target} ship: train it (actserve train {target}), then export it with --checkpoint"
        )
    if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", path):
        raise UsageError(f"expected module:factory, such as my_policies.walker:make; got {target!r}")
    return path
