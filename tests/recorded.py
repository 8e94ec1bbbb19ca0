"""Recordings for tests: a recorder without a budget, and the replay of its shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from actserve.client.remote_policy import RemotePolicy
from actserve.core.signature import Arrays, Signature
from actserve.recording.budget import Budget
from actserve.recording.reader import Recording, Step
from actserve.recording.recorder import Recorder
from actserve.recording.replay import Comparison, Player, ProgramActor
from actserve.recording.writer import Writer
from tests.fake_policy import NAME
from tests.stream_service import Service, running

WINDOW_BYTES = 1 << 20


class Unlimited(Budget):
    """Always has room, however slow the machine is."""

    def has_room(self, reserve: bool = False) -> bool:
        return True


@contextmanager
def recording(folder: Path, buffer_bytes: int = 64 << 20, excluded: Sequence[str] = ()) -> Iterator[Recorder]:
    """A recorder that records everything. When the block ends, the shards in `folder` are complete."""
    recorder = Recorder(str(folder), Unlimited(1.0), buffer_bytes, excluded)
    with Writer(recorder, folder):
        yield recorder
    assert recorder.stopped is None


@contextmanager
def recorded_remote(folder: Path) -> Iterator[tuple[Service, RemotePolicy]]:
    """A recorded service and a client of it."""
    with (
        recording(folder) as recorder,
        running(recorder=recorder) as service,
        RemotePolicy(service.url, NAME) as policy,
    ):
        yield service, policy


def steps_in(folder: Path, policy: str) -> list[Step]:
    """Every step, in order."""
    return [step for window in Recording(folder).of(policy).windows(WINDOW_BYTES) for step in window]


def replayed(
    folder: Path, policy: str, signature: Signature, run: Callable[[Arrays], Arrays], version: int | None = None
) -> tuple[Comparison, Player]:
    """The replay of the steps that `version` took, on the program `run`."""
    steps = Recording(folder).of(policy, version)
    actor = ProgramActor(signature, run)
    player, comparison = Player(actor, steps.signature), Comparison(signature)
    for window in steps.windows(WINDOW_BYTES):
        for batch, outputs in player.play(window):
            comparison.add(batch, outputs)
    return comparison, player
