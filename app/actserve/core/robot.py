"""The robot that a policy was trained on. A client must reproduce it, or the policy does not act as trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict

from actserve.core.errors import EnvironmentMismatch

_SAME_PERIOD = 0.01  # of the period: clocks are not exact


@dataclass(frozen=True)
class ObservationTerm:
    """A part of an observation. `elements` are the names of its elements, in order, such as those of joints.

    The environment multiplied the raw values by `scale`, one number for all elements or one for each; empty: by 1.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    elements: tuple[str, ...] = ()
    units: str = ""
    scale: tuple[float, ...] = ()
    history: int = 1  # steps that the term holds, the latest one included


# How a camera's image of another size is fitted: with black margins, which keeps its proportions, or without; "": not.
Resize = Literal["", "pad", "stretch"]


@dataclass(frozen=True)
class Robot:
    """Names are in the order of the policy's tensors. Empty: not known.

    The robot's command is action * `action_scale` + `action_offset`, in `action_units`; each is one number for all
    elements, or one for each.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    joints: tuple[str, ...]  # of the action
    action_units: str = ""
    action_scale: tuple[float, ...] = ()
    action_offset: tuple[float, ...] = ()
    control_period_s: float | None = None  # between two actions
    observations: tuple[ObservationTerm, ...] = ()
    default_positions: tuple[float, ...] = ()  # of the joints, rad or m
    stiffness: tuple[float, ...] = ()  # of the joints' controllers in training
    damping: tuple[float, ...] = ()
    resize_images: Resize = ""

    def check(self, client: Robot) -> None:
        """Raise `EnvironmentMismatch` if a client's robot differs in anything that it names."""
        ours, theirs = (tuple(term.name for term in robot.observations) for robot in (self, client))
        _check("the joints", self.joints, client.joints)
        _check("the observation terms", ours, theirs)
        for name in ("action_units", "action_scale", "action_offset"):
            _check(f"the {name}", getattr(self, name), getattr(client, name))
        known, given = self.control_period_s, client.control_period_s
        if known and given and abs(given - known) > _SAME_PERIOD * known:
            raise EnvironmentMismatch(
                f"the policy was trained with a control period of {known:g} s; the client's is {given:g} s",
                expected=known,
                got=given,
            )


def _check(what: str, known: Any, named: Any) -> None:
    if not named or named == known:
        return
    if not known:
        raise EnvironmentMismatch(f"{what} that the policy was trained with are not known; the client names some")
    order = ", in another order" if sorted(named) == sorted(known) else ""
    raise EnvironmentMismatch(
        f"expected {what} that the policy was trained with, {_listed(known)}; the client names {_listed(named)}{order}",
        expected=known,
        got=named,
    )


def _listed(value: Any) -> str:
    return value if isinstance(value, str) else ", ".join(map(str, value))
