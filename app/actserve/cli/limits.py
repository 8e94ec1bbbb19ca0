"""The limits of a policy as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from actserve.core.limits import OutputLimits
from actserve.core.signature import Signature


def describe_limits(signature: Signature) -> Iterator[str]:
    """One line for each output with limits: ``action: -1 to 1, change at most 0.2 a step, not finite: hold``."""
    if signature.limits is None:
        return
    for limit in signature.limits.outputs:
        yield f"{limit.output}: {', '.join(_parts(limit))}"
    if signature.limits.finite_observations:
        yield "observations that are not finite mean the fallback"


def _parts(limit: OutputLimits) -> Iterator[str]:
    if limit.allowed is not None:
        yield f"one of {_numbers(limit.allowed)}"
    if limit.low is not None or limit.high is not None:
        low = "any" if limit.low is None else _numbers(limit.low)
        yield f"{low} to {'any' if limit.high is None else _numbers(limit.high)}"
    if limit.change is not None:
        yield f"change at most {_numbers(limit.change)} a step"
    if limit.dwell is not None:
        yield f"stays for {limit.dwell} steps"
    if limit.start is not None:
        yield f"starts from {_numbers(limit.start)}"
    yield f"not finite: {limit.fallback if isinstance(limit.fallback, str) else _numbers(limit.fallback)}"


def _numbers(values: Sequence[float]) -> str:
    """One number if all are the same."""
    unique: Iterable[float] = dict.fromkeys(values)
    listed = [f"{value:g}" for value in (unique if len(set(values)) == 1 else values)]
    return listed[0] if len(listed) == 1 else f"[{', '.join(listed)}]"
