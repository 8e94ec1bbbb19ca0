"""Statistics of a policy's scores, as the literature reports them.

The mean, the median and the interquartile mean (IQM), with bootstrap intervals (Agarwal et al. 2021, "Deep
reinforcement learning at the edge of the statistical precipice"), and the human-normalised score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from actserve.atari.human_scores import normalised
from actserve.atari.play import Report
from actserve.core.environment import Environment
from actserve.core.errors import UsageError
from actserve.core.imports import import_extra

CONFIDENCE = 0.95
BOOTSTRAP_RESAMPLES = 10_000
Interval = tuple[float, float]


@dataclass(frozen=True)
class Summary:
    """The statistics of one policy's scores. Intervals are 95 % intervals, and None for a single game."""

    games: int
    mean: float
    mean_interval: Interval | None
    median: float
    iqm: float  # the mean of the middle half
    iqm_interval: Interval | None
    lowest: float
    highest: float
    lost: int  # games with a score below zero
    human_normalised: float | None  # the mean on a scale where 0 is random play and 1 a human tester

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Two reports of the same seeds, compared game by game."""

    first: str
    second: str
    difference: float  # the mean of first score minus second score
    difference_interval: Interval | None
    better: int  # games in which the first scored more
    equal: int
    worse: int
    same_actions: int  # games in which both took exactly the same actions

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(scores: Sequence[float], game: str) -> Summary:
    """The statistics of `scores` (one or more) in `game` (a ROM's name). Raises `UsageError` if scipy is missing."""
    values = np.array(scores, np.float64)
    mean = float(values.mean())
    return Summary(
        games=len(values),
        mean=mean,
        mean_interval=_interval(values, np.mean),
        median=float(np.median(values)),
        iqm=float(_iqm(values)),
        iqm_interval=_interval(values, _iqm),
        lowest=float(values.min()),
        highest=float(values.max()),
        lost=int((values < 0).sum()),
        human_normalised=normalised(game, mean),
    )


def compare(first: Report, second: Report) -> Comparison:
    """Compare two reports. Raises `UsageError` unless both played the same seeds of the same game."""
    seeds = [[episode.seed for episode in report.episodes] for report in (first, second)]
    if seeds[0] != seeds[1] or first.game != second.game:
        raise UsageError(
            "expected both policies to play the same game with the same seeds; "
            f"got {first.game} with seeds {seeds[0]} and {second.game} with seeds {seeds[1]}"
        )
    differences = np.array(first.scores) - np.array(second.scores)
    pairs = zip(first.episodes, second.episodes, strict=True)
    return Comparison(
        first=f"{first.policy} on .{first.runtime}",
        second=f"{second.policy} on .{second.runtime}",
        difference=float(differences.mean()),
        difference_interval=_interval(differences, np.mean),
        better=int((differences > 0).sum()),
        equal=int((differences == 0).sum()),
        worse=int((differences < 0).sum()),
        same_actions=sum(one.actions_sha256 == other.actions_sha256 for one, other in pairs),
    )


def _iqm(values: NDArray[np.float64], axis: int = -1) -> Any:
    return import_extra("evaluate", "scipy.stats:trim_mean")(values, 0.25, axis=axis)


def _interval(values: NDArray[np.float64], statistic: Callable[..., Any]) -> Interval | None:
    """The percentile bootstrap interval, with a fixed seed. None for a single value."""
    if len(values) < 2:
        return None
    result = import_extra("evaluate", "scipy.stats:bootstrap")(
        (values,),
        statistic,
        n_resamples=BOOTSTRAP_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return (float(result.confidence_interval.low), float(result.confidence_interval.high))


def check_machado(environment: Environment) -> None:
    """Raises `UsageError` unless `environment` follows Machado et al. 2018.

    They recommend sticky actions with probability 0.25 and whole games, without life loss as an end or clipped rewards.
    As in Gymnasium's v5, a game has at most 108,000 frames (half an hour). Their experiments skip 5 frames and use all
    18 actions; frame skip 4 and the minimal set, as in v5, are accepted too.
    """
    wanted = {"repeat_action_probability": 0.25, "max_frames": 108_000}
    wrong = {name: value for name, value in wanted.items() if getattr(environment, name) != value}
    if wrong:
        found = ", ".join(f"{name} {getattr(environment, name)}" for name in wrong)
        expected = ", ".join(f"{name} {value}" for name, value in wrong.items())
        raise UsageError(f"the protocol requires {expected}; the policy was trained with {found}")


PROTOCOLS: dict[str, Callable[[Environment], None]] = {"machado": check_machado}


def print_summary(summary: Summary, console: Console) -> None:
    console.print(
        f"{summary.games} games: mean {summary.mean:+.2f}{_interval_text(summary.mean_interval)}, "
        f"median {summary.median:+.1f}, IQM {summary.iqm:+.2f}{_interval_text(summary.iqm_interval)}, "
        f"{summary.lowest:+.0f} to {summary.highest:+.0f}, {summary.lost} lost",
        highlight=False,
    )
    if summary.human_normalised is not None:
        console.print(f"human-normalised {summary.human_normalised:.2f} (0 is random play, 1 a human tester)")


def print_comparison(comparison: Comparison, console: Console) -> None:
    table = Table(title=f"{comparison.first} against {comparison.second}, game by game")
    for heading in ("difference", "better", "equal", "worse", "same actions"):
        table.add_column(heading, justify="right")
    table.add_row(
        f"{comparison.difference:+.2f}{_interval_text(comparison.difference_interval)}",
        str(comparison.better),
        str(comparison.equal),
        str(comparison.worse),
        str(comparison.same_actions),
    )
    console.print(table)


def _interval_text(interval: Interval | None) -> str:
    return "" if interval is None else f" ({interval[0]:+.2f} to {interval[1]:+.2f})"
