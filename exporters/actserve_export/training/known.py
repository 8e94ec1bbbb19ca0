"""The policies that `actserve train` and `export` know by name. This table imports none of them."""

from __future__ import annotations

from dataclasses import dataclass

from ale_py import roms


@dataclass(frozen=True)
class Known:
    """A policy's factory and its training methods, as names for `pkgutil.resolve_name`.

    `factory(*arguments)` returns a `PolicySource`. Each function in `train`, by method, is called with a `Run`, a seed
    and `arguments`, and fills the run. The first method is the default.
    """

    factory: str
    train: dict[str, str]
    arguments: tuple[str, ...] = ()
    weights_ship: bool = True


BUNDLED = {
    "pong": Known(
        "actserve_export.training.pong:pong",
        {"distill": "actserve_export.training.distill:train", "dqn": "actserve_export.training.dqn:train"},
    ),
    "pong-lstm": Known(
        "actserve_export.training.pong:pong_lstm", {"distill": "actserve_export.training.distill:train_recurrent"}
    ),
}


def find(name: str) -> Known | None:
    """A bundled policy, or for the name of any other game of ale-py the tutorial's DQN, whose weights do not ship."""
    game = name.replace("-", "_")
    if name in BUNDLED or game not in roms.get_all_rom_ids():
        return BUNDLED.get(name)
    return Known(
        "actserve_export.training.atari:source",
        {"dqn": "actserve_export.training.dqn:train"},
        (game,),
        weights_ship=False,
    )


def expected() -> str:
    """What `find` finds, for messages."""
    return f"{', '.join(BUNDLED)}, a game of ale-py (breakout, …)"
