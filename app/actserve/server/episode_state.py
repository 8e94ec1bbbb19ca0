"""EpisodeState: one episode of a policy, from step to step. Each stream and each robot has one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from actserve import wire
from actserve.core.completion import choose_exploration, complete, step_seed
from actserve.core.errors import ActserveError
from actserve.core.signature import IS_INIT, Arrays, TensorSpec
from actserve.engine.batch import BatchResult
from actserve.engine.policy import Acted, Policy
from actserve.engine.recorders import Door, EpisodeRecorder, Feedback, StepRecorder, committed
from actserve.server.access.tokens import Token
from actserve.server.admission import Admission, Ticket, name_of
from actserve.server.chunk_steps import chunk_steps
from actserve.server.http.error_responses import log_if_internal, status_of
from actserve.server.memory import STREAM_BYTES
from actserve.telemetry.counts import Tally


class Step(NamedTuple):
    """The result of a step: the outputs by name, each (*shape), and how long it waited and ran."""

    outputs: Arrays
    queue_ns: int
    run_ns: int


class EpisodeState:
    """An episode with the options in `query`: `outputs`, `seed`, `exploration`, `chunk` and `ahead`. `close` it.

    With an `arena`, the state is in its `slot`. `arena` is None if the policy has none, if noise is drawn, or if chunks
    are handed out action by action.

    `token` is charged for messages, and `tally` counts their answers. A recording names the `door`. Raises
    `MalformedBody`, `InvalidRequest`, `UnknownOutput` or `MemoryFull`.
    """

    def __init__(
        self,
        policy: Policy,
        admission: Admission,
        tally: Tally,
        token: Token | None,
        query: Mapping[str, str],
        door: Door,
    ) -> None:
        signature = policy.signature
        self.policy, self.batcher, self.admission, self._tally = policy, policy.batcher, admission, tally
        self.exploration, self.seed = choose_exploration(signature, *wire.read_randomness(query))
        selected = signature.select([name for name in query.get("outputs", "").split(",") if name])
        self.chunks = chunk_steps(signature, query, selected)
        self.action: TensorSpec = signature.action
        self.outputs = tuple(spec for spec in signature.outputs if spec is self.action or spec.name in selected)
        if self.chunks is not None:
            self.action = self.chunks.action
            self.outputs = (self.action,)
        self._names = [spec.name for spec in self.outputs]
        self.steps = 0  # since the episode began
        self.slot: int | None = None
        self._recorder: EpisodeRecorder | None = None
        if policy.recorder is not None:
            self._recorder = policy.recorder.episode(door, name_of(token))
        self._state: Arrays = {}  # each (1, *shape); empty before the first step, and if the arena has the state
        self._token = token
        self._ticket: Ticket | None = None  # of a message that was charged and is not answered yet
        self._held_bytes = STREAM_BYTES + sum(state.spec.item_bytes for state in signature.state)
        admission.memory.take(self._held_bytes)
        by_default = self.seed is None and self.exploration == signature.exploration[0] and self.chunks is None
        self.arena = policy.batcher.arena if by_default else None
        if self.arena is not None:
            self.slot = self.arena.keep()

    # messages

    def new_ticket(self) -> Ticket:
        """A ticket for one message, charged when the message is admitted."""
        return Ticket(self._token, memory=self.admission.memory)

    def leave(self, ticket: Ticket) -> None:
        """Leave a message that the fast path has charged to the route: `open_message` does not charge it again."""
        self._ticket = ticket

    def open_message(self, ticket: Ticket | None = None) -> None:
        """Charge for one message, before it is decoded. Without `ticket`, the token is that of the episode.

        Raises `Unauthorized` or `RateLimited`.
        """
        ticket, self._ticket = ticket or self._ticket or self.new_ticket(), None
        self.admission.open_message(ticket)

    def refused(self, error: ActserveError) -> int:
        """Count an error that the client is told, and log it if it is internal; returns its HTTP status."""
        log_if_internal(error)
        status = status_of(error)
        self._tally.add(str(status), error.code)
        return status

    def failed(self) -> None:
        """Count a failure of the service itself."""
        self._tally.add("500", "internal")

    # steps

    async def act(self, tensors: Arrays, patience_ns: int = 0) -> Step:
        """Take a step. `tensors` are those of a valid request of one item. If this raises, the state has not changed.

        Raises as `Admission.act`.
        """
        run = partial(self._run, tensors, patience_ns)
        if self.chunks is None:
            acted = await run()
            self._keep(acted)
        else:
            is_init = bool(tensors.get(IS_INIT.name, IS_INIT.zeros(1))[0])
            acted = await self.chunks.step(run, self._keep, is_init)
        return self._stepped(acted.outputs, 0, acted.queue_ns, acted.run_ns)

    def inputs(self, tensors: Arrays) -> Arrays:
        """Every input of the program for the next step without an arena, each (1, *shape)."""
        return complete(self.policy.signature, tensors | self._state, 1, self.exploration, self._step_seed()).inputs

    def stepped(self, outcome: BatchResult, start: int, queue_ns: int) -> Step:
        """The step that the fast path has taken, at `start` of a successful batch. An arena has the state already."""
        if self.arena is None:
            self._state = {
                state.spec.name: outcome.outputs[state.output][start : start + 1].copy()
                for state in self.policy.signature.state
            }
        return self._stepped(outcome.outputs, start, queue_ns, outcome.run_ns)

    def _step_seed(self) -> int | None:
        return None if self.seed is None else step_seed(self.seed, self.steps + 1)

    def _stepped(self, outputs: Arrays, start: int, queue_ns: int, run_ns: int) -> Step:
        self.steps += 1
        self._tally.answered += 1
        return Step({name: outputs[name][start] for name in self._names}, queue_ns, run_ns)

    async def _run(self, tensors: Arrays, patience_ns: int) -> Acted:
        state = self._state
        if self.arena is not None and self.slot is not None and self.steps:
            state = self.arena.state(self.slot)
        options = (1, self.exploration, self._step_seed(), patience_ns)
        return await self.admission.act(self.policy, tensors | state, *options, self.step_recorder())

    def step_recorder(self) -> StepRecorder | None:
        """The recorder of the next step."""
        if self._recorder is None:
            return None
        recorder = self._recorder.step(self.steps + 1)
        recorder.seed = self._step_seed()
        return recorder

    @property
    def is_recorded(self) -> bool:
        """Whether the service records, and this client is not excluded."""
        return self._recorder is not None

    def tell(self, feedback: Feedback) -> None:
        """The client tells the result of the last step, for the recording."""
        if self._recorder is not None:
            self._recorder.tell(feedback)

    def _keep(self, acted: Acted) -> None:
        # `state_after` copies: a view would keep the array of the whole batch in memory.
        state = self.policy.state_after(acted)
        if self.arena is not None and self.slot is not None:
            self.arena.set_state(self.slot, state)
        else:
            self._state = state
        committed(acted.recorder)

    def close(self) -> None:
        """Free the state. A step that is still in progress changes nothing else: the slot may be another episode's."""
        if self._recorder is not None:
            self._recorder.end()
        if self.chunks is not None:
            self.chunks.close()
        if self.arena is not None:
            self.arena.forget(self.slot)
        self.arena = self.slot = None
        self.admission.memory.give_back(self._held_bytes)
        self._held_bytes = 0
