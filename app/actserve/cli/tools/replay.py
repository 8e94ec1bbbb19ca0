"""Plays a recording on a version of its policy, and compares the actions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from safetensors.numpy import save_file

from actserve.cli.tools.programs import open_best
from actserve.core.errors import RuntimeRefused, UsageError
from actserve.core.limits import Reason
from actserve.recording.reader import Step, Steps
from actserve.recording.remote_actor import RemoteActor
from actserve.recording.replay import Actor, Comparison, LimitedSteps, Player, ProgramActor
from actserve.store.artifact import Artifact

WINDOW_BYTES = 64 << 20  # of steps that are read at once: steps of so many episodes are in one batch

Rate = Literal["own", "full"]


@dataclass(frozen=True)
class Replayed:
    """The result of a replay. `label` is the version that acted, and `runtime` its program."""

    label: str
    runtime: str
    skipped: int  # steps that could not be played
    comparison: Comparison
    seconds: float

    @property
    def diverges(self) -> bool:
        return self.comparison.first is not None

    def as_json(self) -> dict[str, Any]:
        """The object that `actserve replay --json` prints."""
        found = self.comparison
        return {
            "policy": self.label,
            "runtime": self.runtime,
            "steps": found.steps,
            "same": found.same,
            "identical": found.identical,
            "skipped": self.skipped,
            "seconds": round(self.seconds, 3),
            "limits": {
                "recorded": found.recorded_limits.as_json(),
                "replayed": found.replayed_limits.as_json(),
            },
            "first": found.first and found.first.as_json(found.signature.action.name),
        }


@contextmanager
def program(artifact: Artifact) -> Iterator[tuple[ProgramActor, str, str]]:
    """The best program of an artifact, its label and its runtime. Raises `RuntimeRefused` if this host can run none."""
    runtime, (choice, reason) = open_best(artifact)
    if runtime is None or choice is None:
        raise RuntimeRefused(f"{artifact.label} cannot run here: {reason}")
    try:
        yield ProgramActor(runtime.signature, runtime.run), artifact.label, choice.runtime
    finally:
        runtime.close()


@contextmanager
def service(url: str, policy: str, version: int | None, token: str | None) -> Iterator[tuple[RemoteActor, str, str]]:
    """The live version of a policy of a service, its label and its runtime."""
    with RemoteActor(url, policy, version, token) as actor:
        yield actor, f"{policy}@{actor.description.version}", actor.description.runtime


def replay(
    steps: Steps, actor: Actor, label: str, runtime: str, rate: Rate, progress: Callable[[int], None]
) -> Replayed:
    """Play `steps` on `actor`. `progress` is called with the number of steps that were played since the last call."""
    player, comparison = Player(actor, steps.signature), Comparison(actor.signature)
    begun_s = time.monotonic()
    for window in _windows(steps, rate):
        for batch, outputs in player.play(window):
            comparison.add(batch, outputs)
            progress(len(batch))
    return Replayed(label, runtime, player.skipped, comparison, time.monotonic() - begun_s)


def _windows(steps: Steps, rate: Rate) -> Iterator[list[Step]]:
    """The steps in lists; at their own rate, each when it is due."""
    first: Step | None = None
    begun_s = time.monotonic()
    for window in steps.windows(WINDOW_BYTES):
        if rate == "full":
            yield window
            continue
        for step in window:
            first = first or step
            due_s = begun_s + (step.time - first.time).total_seconds()
            time.sleep(max(0.0, due_s - time.monotonic()))
            yield [step]


def show(found: Replayed, console: Console, saved: Path | None, command: str) -> None:
    """Print the result as text. `command` shows how to see the first step that diverges."""
    comparison = found.comparison
    console.print(
        f"{found.label} (.{found.runtime}): the same action in {comparison.same:,} of {comparison.steps:,} steps "
        f"({comparison.share:.2%}); all outputs bit for bit in {comparison.identical:,}",
        highlight=False,
    )
    if found.skipped:
        console.print(f"  {found.skipped:,} steps not played: their state is not in the recording", highlight=False)
    for what, limits in (("recorded", comparison.recorded_limits), ("replayed", comparison.replayed_limits)):
        if limits.steps:
            console.print(f"  {_limited(what, limits)}", highlight=False)
    first = comparison.first
    if first is None:
        return
    action = comparison.signature.action.name
    recorded, replayed = first.recorded[action].tolist(), first.replayed[action].tolist()
    leads = [first.lead(first.recorded), first.lead(first.replayed)]
    shown = [f" (lead {lead:.3g})" if lead is not None else "" for lead in leads]
    console.print(
        f"  first at step {first.step} of episode {first.episode}, {first.time.isoformat(timespec='milliseconds')}: "
        f"version {first.version} did {recorded}{shown[0]}, now {replayed}{shown[1]}",
        highlight=False,
    )
    where = (
        f"its observations and both outputs are in {saved}"
        if saved
        else f"to see it: {command} --save step.safetensors"
    )
    console.print(f"  {where}", highlight=False, markup=False)


def _limited(what: str, found: LimitedSteps) -> str:
    reasons = ", ".join(f"{reason.label} {found.reasons[reason]:,}" for reason in Reason if found.reasons[reason])
    return f"{what}: limits acted in {found.limited:,} of {found.steps:,} steps" + (f" ({reasons})" if reasons else "")


def save(found: Replayed, path: Path) -> bool:
    """Write the first step that diverges to a safetensors file; False if there is none. Raises `UsageError`."""
    first = found.comparison.first
    if first is None:
        return False
    try:
        save_file(first.tensors(), path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
    return True
