"""The policies that `actserve train` and `export` know by name. This table imports none of them."""

from __future__ import annotations

from dataclasses import dataclass

from ale_py import roms


@dataclass(frozen=True)
class Known:
    """Import paths, followed only when needed: see `app.lazy.resolve`.

    `factory(*arguments)` gives the `exporters.source.PolicySource`; each of `train`, by method, fills an
    `exporters.train.Run` when called with it, a seed, and `arguments`. The first method is the default.
    """

    factory: str
    train: dict[str, str]
    arguments: tuple[str, ...] = ()
    weights_ship: bool = True


BUNDLED = {
    "pong": Known(
        "exporters.policies.pong:pong",
        {"distill": "exporters.policies.distill:train", "dqn": "exporters.policies.dqn:train"},
    ),
    "pong-lstm": Known("exporters.policies.pong:pong_lstm", {"distill": "exporters.policies.distill:train_recurrent"}),
}


def find(name: str) -> Known | None:
    """A bundled policy, or for the name of any other game of ale-py the tutorial's DQN, whose weights do not ship."""
    game = name.replace("-", "_")
    if name in BUNDLED or game not in roms.get_all_rom_ids():
        return BUNDLED.get(name)
    return Known(
        "exporters.policies.atari:source", {"dqn": "exporters.policies.dqn:train"}, (game,), weights_ship=False
    )


def expected() -> str:
    """What `find` finds, for messages."""
    return f"{', '.join(BUNDLED)}, a game of ale-py (breakout, …)"
