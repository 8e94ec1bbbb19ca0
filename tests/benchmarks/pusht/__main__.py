"""The score in gym-pusht through a slow network.

Run: PYTHONPATH=app:exporters:. .venv/robots/bin/python -m tests.benchmarks.pusht --episodes 50
`make .venv/robots/installed` installs the environment. The run takes about ten minutes, most of them on one core.

A small network learns on the spot to push as a scripted expert does. It reads what is left of its last chunk of actions
and how late its answer will come. actserve exports and serves it. Then it plays the same seeds in three ways:

* without latency: the simulation waits for each chunk of actions;
* `Realtime`: each answer is delayed by 150 ± 20 ms, and the environment advances ten times a second all the same;
* ask and wait: through the same network, a plain client asks for each action and waits; the last one is held meanwhile.

The control period is 0.1 s, gym-pusht's own. The score is the largest share of the goal that the block covered in an
episode, in percent. An episode ends once that is over 95 %, or after 30 s. The differences are paired: by seed, to the
episodes without latency. The intervals are those of the mean, 95 %. A period is late if it began 20 ms after its time:
many late ones mean that this machine is too slow for so many episodes at once.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import NormalDist, fmean, stdev

from rich.console import Console
from rich.progress import track
from rich.table import Table

from actserve.cli.tools import local_service as local
from actserve_export.publish import export
from tests.benchmarks.pusht import play
from tests.benchmarks.pusht.distil import distilled, source
from tests.benchmarks.pusht.play import PERIOD_S, Played
from tests.benchmarks.realtime import delayed, percentiles

HEADER = ("", "score", "difference", "solved", "seconds", "held", "late", "answer ms p50, p99, most")


@dataclass(frozen=True)
class Interval:
    """A mean and the half of its 95 % interval."""

    mean: float
    margin: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.margin:.1f}"


def interval(values: Sequence[float]) -> Interval:
    """Needs two values or more."""
    return Interval(fmean(values), NormalDist().inv_cdf(0.975) * stdev(values) / math.sqrt(len(values)))


@dataclass(frozen=True)
class Summary:
    """The episodes of one way to play."""

    score: Interval
    difference: Interval | None  # of the scores to those without latency, seed by seed
    solved: float  # share of the episodes
    seconds: float  # mean length of an episode
    held: float  # share of the control periods in which the last action was repeated, as no new one had come
    late: float  # share of the control periods that began late, because of this machine
    answer_ms: dict[str, float] | None


def summary(episodes: Sequence[Played], reference: Sequence[Played] | None = None) -> Summary:
    """`reference` are the episodes to compare with, of the same seeds in the same order."""
    steps = sum(played.steps for played in episodes)
    answer_ms = [value for played in episodes for value in played.answer_ms]
    pairs = zip(episodes, reference or (), strict=reference is not None)
    return Summary(
        score=interval([played.score for played in episodes]),
        difference=interval([played.score - other.score for played, other in pairs]) if reference else None,
        solved=fmean(played.solved for played in episodes),
        seconds=PERIOD_S * steps / len(episodes),
        held=sum(played.held for played in episodes) / steps,
        late=sum(played.late for played in episodes) / steps,
        answer_ms=percentiles(answer_ms) if answer_ms else None,
    )


def lines(found: Mapping[str, Summary]) -> list[list[str]]:
    """The table's lines, with `HEADER` above them."""
    return [
        [
            name, str(way.score), str(way.difference or ""), f"{100 * way.solved:.0f} %", f"{way.seconds:.1f}",
            f"{100 * way.held:.1f} %", f"{100 * way.late:.1f} %",
            ", ".join(f"{value:.0f}" for value in (way.answer_ms or {}).values()),
        ]
        for name, way in found.items()
    ]  # fmt: skip


def measured(episodes: int, at_once: int, progress: Console) -> dict[str, Summary]:
    """Train, serve and play."""
    cores = os.cpu_count() or 1
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.benchmarks.pusht.play"])

    def played(way: Callable[[int], Played], title: str, processes: int) -> list[Played]:
        with context.Pool(processes) as pool:
            return list(track(pool.imap(way, range(episodes)), title, episodes, console=progress))

    nothing = played(play.standing_still, "nobody plays", cores)
    expert = played(play.by_the_expert, "the expert plays", cores)
    learner, lessons = distilled(progress.print)
    with tempfile.TemporaryDirectory() as folder:
        export(source(learner, lessons), "pusht", folder, runtimes=["onnx"], progress=progress.print)
        with local.serve(folder, "--runtime", "onnx") as service, delayed(service.url) as slow:
            at_rest = played(partial(play.without_latency, service.url), "without latency", cores)
            in_time = played(partial(play.in_real_time, slow), "Realtime", at_once)
            waiting = played(partial(play.asking_and_waiting, slow), "ask and wait", at_once)
    return {
        "nobody": summary(nothing),
        "the expert": summary(expert),
        "without latency": summary(at_rest),
        "Realtime": summary(in_time, at_rest),
        "ask and wait": summary(waiting, at_rest),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=50, help="of each way to play, two or more")
    parser.add_argument("--at-once", type=int, default=25, help="episodes in real time that run side by side")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    arguments = parser.parse_args()
    if arguments.episodes < 2 or arguments.at_once < 1:
        parser.error("expected two or more --episodes, and at least one --at-once")
    found = measured(arguments.episodes, arguments.at_once, Console(stderr=True))
    if arguments.json:
        print(json.dumps({name: asdict(way) for name, way in found.items()}, indent=2))
        return
    table = Table(*HEADER)
    for line in lines(found):
        table.add_row(*line)
    Console().print(table)


if __name__ == "__main__":
    main()
