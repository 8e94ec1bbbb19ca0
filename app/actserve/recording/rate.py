"""How many steps a second a recording has."""

from __future__ import annotations

import numpy as np
from pydantic import TypeAdapter, ValidationError

from actserve.core.environment import Contract, Environment
from actserve.recording.reader import Steps, Transitions

_CONTRACT: TypeAdapter[Contract | None] = TypeAdapter(Contract | None)


def contract_of(steps: Steps) -> Contract | None:
    """The environment of the newest version, if it is known."""
    try:
        return _CONTRACT.validate_python(steps.newest.environment)
    except ValidationError:  # of a later actserve
        return None


def steps_per_second(steps: Steps, transitions: Transitions) -> float | None:
    """The rate of the game or robot, else of the median step; None if no step follows another."""
    contract = contract_of(steps)
    if isinstance(contract, Environment):
        return contract.actions_per_second
    if contract is not None and contract.control_period_s:
        return 1 / contract.control_period_s
    periods = np.diff(transitions.time)[~transitions.is_last[:-1]] / np.timedelta64(1, "s")
    period = float(np.median(periods)) if len(periods) else 0.0
    return 1 / period if period > 0 else None
