"""Recorder: what one worker records. It decides which episodes are recorded, and copies their steps.

The event loop copies a step and appends it to a buffer; `actserve.recording.writer` writes the buffer in a thread. The
buffer is bounded in bytes, and all the work in CPU time: a new episode begins only if both have room. If a step of a
recorded episode finds no room, the episode ends there in the recording, so everything that is recorded can be replayed.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from time import perf_counter_ns
from typing import Any, Literal

from actserve.core.signature import IS_INIT, Arrays
from actserve.engine.recorders import Door, EpisodeRecorder, Feedback, PolicyRecorder, ServiceRecorder, StepRecorder
from actserve.recording.blocks import Blocks
from actserve.recording.budget import Budget
from actserve.recording.rows import Rows, parts
from actserve.store.artifact import Artifact

log = logging.getLogger("actserve")

KEPT_VERSIONS = 64  # whose steps are counted: a policy may have any number of versions
MAX_SESSIONS = 4096  # whose recording goes on; a session that comes back later begins another part

Outcome = Literal["recorded", "budget", "buffer", "stopped"]
"""What became of a step. All but the first: why it was not recorded. "budget": its episode was not chosen."""


@dataclass(eq=False)
class Recorded:
    """One version of a policy, as the writer needs it."""

    artifact: Artifact
    runtime: str
    outcomes: Counter[Outcome] = field(
        default_factory=Counter
    )  # steps; a stateless request that is not recorded is one
    unchosen: int = 0  # more of the outcome "budget": an int of its own, because the fast path counts it
    feedback: dict[str, Feedback] = field(default_factory=dict)  # on last steps, by the first id of their episode
    ended: dict[str, int] = field(default_factory=dict)  # incomplete episodes, by id: the step that was dropped

    def counts(self) -> dict[Outcome, int]:
        """The steps, by outcome."""
        return {**self.outcomes, "budget": self.outcomes["budget"] + self.unchosen}


class Recorder(ServiceRecorder):
    """`where` is for the log. `excluded` are names of tokens that are not recorded."""

    def __init__(
        self,
        where: str,
        budget: Budget,
        buffer_bytes: int,
        excluded: Collection[str] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.where = where
        self.budget = budget
        self.blocks = Blocks()
        self.excluded = frozenset(excluded)
        self.rows: deque[tuple[Recorded, Rows]] = deque()  # not written yet
        self.recorded: list[Recorded] = []  # the versions that were loaded last
        self.stopped: str | None = None  # why nothing is recorded any more
        self.file_bytes = 0  # of complete shards
        self._buffer_bytes = buffer_bytes
        self._clock = clock

    def of(self, artifact: Artifact, runtime: str) -> RecordedPolicy:
        recorded = next(
            (known for known in self.recorded if (known.artifact, known.runtime) == (artifact, runtime)), None
        )
        if recorded is None:
            recorded = Recorded(artifact, runtime)
            self.recorded = [*self.recorded, recorded][-KEPT_VERSIONS:]
        return RecordedPolicy(self, recorded)

    def describe(self) -> dict[str, Any]:
        steps = sum((recorded.outcomes for recorded in self.recorded), Counter[Outcome]())
        return {"stopped": self.stopped, "recorded": steps["recorded"], "dropped": steps["buffer"]}

    def stop(self, reason: str) -> None:
        """Record nothing more. Called in any thread."""
        self.stopped = reason
        self.rows.clear()
        log.error("recording into %s has stopped: %s; the service goes on", self.where, reason)

    def may_begin(self, reserve: bool = False) -> Outcome | None:
        """Why no new episode may begin; None if it may. `reserve` as in `Budget.has_room`."""
        if self.stopped is not None:
            return "stopped"
        if self.budget.waiting_bytes > self._buffer_bytes // 2:
            return "buffer"
        return None if self.budget.has_room(reserve) else "budget"

    def takes(self, size_bytes: int) -> bool:
        """Whether so many bytes fit into the buffer."""
        return self.stopped is None and self.budget.waiting_bytes + size_bytes <= self._buffer_bytes

    def add(self, recorded: Recorded, rows: Rows) -> None:
        if self.stopped is None:
            recorded.outcomes["recorded"] += len(rows.episodes)
            self.budget.copied_bytes += rows.size_bytes
            self.rows.append((recorded, rows))

    def now_us(self) -> int:
        return int(self._clock() * 1e6)


class RecordedPolicy(PolicyRecorder):
    """The recorder of one version."""

    def __init__(self, recorder: Recorder, recorded: Recorded) -> None:
        self.recorder, self.recorded = recorder, recorded
        self.signature = recorded.artifact.manifest.signature
        outputs = self.signature.outputs
        self.item_bytes = sum(spec.item_bytes for spec in (*self.signature.request_inputs, *outputs))
        self._sessions: OrderedDict[str, RecordedEpisode] = OrderedDict()

    def request(self, client: str | None) -> StepRecorder | None:
        if self.recorder.budget.is_closed():  # most requests of a peak
            self.recorded.unchosen += 1
            return None
        if client in self.recorder.excluded:
            return None
        outcome = self.recorder.may_begin(reserve=True)
        if outcome is None:
            return RecordedRequest(self, client)
        self.recorded.outcomes[outcome] += 1
        return None

    def episode(self, door: Door, client: str | None) -> RecordedEpisode | None:
        return None if client in self.recorder.excluded else RecordedEpisode(self, secrets.token_hex(8), door, client)

    def session(self, id_: str, door: Door, client: str | None) -> RecordedEpisode | None:
        if client in self.recorder.excluded:
            return None
        episode = self._sessions.get(id_)
        if episode is None:
            # The id of a session is a secret of its client: the recording has its digest.
            digest = blake2b(id_.encode(), digest_size=8).hexdigest()
            episode = self._sessions[id_] = RecordedEpisode(self, digest, door, client, shared=True)
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        else:
            self._sessions.move_to_end(id_)
        return episode

    def copy(self, inputs: Arrays, outputs: Arrays, items: slice, with_state: bool) -> Arrays | None:
        """The tensors of the rows of `items`; None if they find no room."""
        size_bytes = self.item_bytes * (items.stop - items.start)
        if not self.recorder.takes(size_bytes):
            self.recorded.outcomes["stopped" if self.recorder.stopped else "buffer"] += items.stop - items.start
            return None
        begun_ns = perf_counter_ns()
        found = parts(self.signature, inputs, outputs, items, with_state)
        tensors = {name: self.recorder.blocks.copy(array) for name, array in found.items()}
        self.recorder.budget.copying_ns += perf_counter_ns() - begun_ns
        return tensors


class RecordedRequest(StepRecorder):
    """A stateless request: each item is an episode of one step. A large one comes in several batches, in order."""

    def __init__(self, policy: RecordedPolicy, client: str | None) -> None:
        self._policy, self._client = policy, client
        self._items = 0

    def capture(self, inputs: Arrays, outputs: Arrays, items: slice, run_ns: int) -> None:
        policy, first = self._policy, self._items
        size = items.stop - items.start
        self._items += size
        tensors = policy.copy(inputs, outputs, items, with_state=True)
        if tensors is not None:
            episode, now_us = secrets.token_hex(8), policy.recorder.now_us()
            episodes = [f"{episode}.{first + item}" for item in range(size)] if first + size > 1 else [episode]
            follows = None if policy.signature.state else 0
            rows = Rows(
                episodes, 1, follows, now_us, "act", self._client, self.seed, first, None,
                run_ns // 1000, tensors,
            )  # fmt: skip
            policy.recorder.add(policy.recorded, rows)

    def commit(self) -> None:
        """It was committed when it was captured."""


class RecordedEpisode(EpisodeRecorder):
    """An episode. A step with the reset flag begins another one, with the number of the step in its id.

    Several processes may take the steps of a `shared` one. Each records those that it takes. Where it did not take the
    step before, the row has the state.
    """

    def __init__(self, policy: RecordedPolicy, id_: str, door: Door, client: str | None, shared: bool = False) -> None:
        self.policy, self.door, self.client = policy, door, client
        self.first_id = self.id = id_
        self.is_shared = shared
        self.last_step: int | None = None  # that was recorded here
        self.skipped: Outcome | None = None  # why this episode is not recorded
        self.is_decided = False  # whether it is recorded
        self._told: Feedback | None = None  # on the steps since the last recorded one

    def step(self, number: int) -> RecordedStep:
        return RecordedStep(self, number)

    def begin(self, number: int) -> None:
        """Decide whether the episode that begins with step `number` is recorded."""
        self.id = self.first_id if number == 1 else f"{self.first_id}.{number}"
        self.decide()

    def decide(self) -> None:
        self.skipped, self.is_decided = self.policy.recorder.may_begin(), True

    def tell(self, feedback: Feedback) -> None:
        if self.last_step is not None and self.skipped is None:
            self._told = feedback if self._told is None else self._told.plus(feedback)

    def take_told(self) -> Feedback | None:
        """What was told since the last call."""
        told, self._told = self._told, None
        return told

    def end(self, feedback: Feedback | None = None) -> None:
        feedback = feedback or self.take_told()  # a door has one way to tell
        if self.last_step is not None and feedback is not None:
            self.policy.recorded.feedback[self.first_id] = feedback

    def drop(self, step: int) -> None:
        """The step was dropped: what follows could not be replayed."""
        self.skipped = "stopped" if self.policy.recorder.stopped else "buffer"
        if self.last_step is not None:
            self.policy.recorded.ended[self.id] = step


class RecordedStep(StepRecorder):
    """One step of an episode: its rows wait here until it is committed."""

    def __init__(self, episode: RecordedEpisode, number: int) -> None:
        self._episode, self._number = episode, number
        self._rows: Rows | None = None

    def capture(self, inputs: Arrays, outputs: Arrays, items: slice, run_ns: int) -> None:
        episode, number, policy = self._episode, self._number, self._episode.policy
        begins = bool(inputs[IS_INIT.name][items.start]) if policy.signature.is_init else number == 1
        if begins:
            episode.begin(number)
        elif not episode.is_decided:
            episode.decide()
        if episode.skipped is not None:
            policy.recorded.outcomes[episode.skipped] += 1
            return
        follows = 0 if begins else episode.last_step
        if episode.is_shared and follows not in (0, number - 1):
            follows = None
        tensors = None
        try:
            tensors = policy.copy(inputs, outputs, items, with_state=follows is None)
        finally:
            if tensors is None:
                episode.drop(number)
        if tensors is None:
            return
        now_us = policy.recorder.now_us()
        self._rows = Rows(
            [episode.id], number, follows, now_us, episode.door, episode.client, self.seed, 0, self.previous,
            run_ns // 1000, tensors,
        )  # fmt: skip

    def commit(self) -> None:
        rows, self._rows = self._rows, None
        told = self._episode.take_told()
        if rows is not None:
            if told is not None:
                rows = replace(rows, previous=told)
            self._episode.last_step = self._number
            self._episode.policy.recorder.add(self._episode.policy.recorded, rows)
