"""The policies that `actserve train` and `export` know by name. The table imports none of them."""

from __future__ import annotations

from dataclasses import dataclass

from ale_py import roms


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


BUNDLED = {
    "pong": KnownPolicy(
        "actserve_export.training.pong:pong",
        {"distill": "actserve_export.training.distill:train", "dqn": "actserve_export.training.dqn:train"},
    ),
    "pong-lstm": KnownPolicy(
        "actserve_export.training.pong:pong_lstm", {"distill": "actserve_export.training.distill:train_recurrent"}
    ),
}


def find_policy(name: str) -> KnownPolicy | None:
    """A bundled policy; for any other game of ale-py, the tutorial's DQN, whose weights do not ship; else None."""
    game = name.replace("-", "_")
    if name in BUNDLED or game not in roms.get_all_rom_ids():
        return BUNDLED.get(name)
    return KnownPolicy(
        "actserve_export.training.atari:source",
        {"dqn": "actserve_export.training.dqn:train"},
        (game,),
        weights_ship=False,
    )


def known_names() -> str:
    """The names that `find_policy` knows, for error messages."""
    return f"{', '.join(BUNDLED)}, a game of ale-py (breakout, …)"
