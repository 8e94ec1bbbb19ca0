"""The weights that ship, and the policies without memory among them."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from actserve_export.sources.policy_source import PolicySource
from actserve_export.training import atari

WEIGHTS = {name: Path(__file__).with_name(f"{name}.safetensors") for name in ("pong", "pong-lstm", "boxing")}


def policy(game: str) -> PolicySource:
    """The policy of `game` for raw screens, with the bundled weights."""
    source = atari.source(game)
    assert source.weights is not None
    source.weights.load_state_dict(load_file(WEIGHTS[game]))
    return source
