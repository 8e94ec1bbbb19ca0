"""EpisodeState: the state of one episode of a policy, from step to step. Each stream and each robot has one."""

from __future__ import annotations

from functools import partial

from actserve.core.completion import choose_exploration, step_seed
from actserve.core.signature import IS_INIT, Arrays, Exploration
from actserve.engine.arena import Arena
from actserve.engine.policy import Acted, Policy
from actserve.engine.recorders import Door, EpisodeRecorder, StepRecorder, committed
from actserve.server.admission import Admission
from actserve.server.chunk_steps import ChunkSteps


class EpisodeState:
    """Raises `InvalidRequest` for an exploration or a seed that the policy cannot have.

    `client` is the name of the client's token.

    With an `arena`, the state is in its `slot`, where the fast path can step the episode. With `chunks`, the policy's
    chunks are handed out action by action.
    """

    def __init__(
        self,
        policy: Policy,
        admission: Admission,
        exploration: Exploration | None = None,
        seed: int | None = None,
        *,
        door: Door,
        client: str | None,
    ) -> None:
        self.policy, self.admission = policy, admission
        self.exploration, self.seed = choose_exploration(policy.signature, exploration, seed)
        self.steps = 0
        self.chunks: ChunkSteps | None = None
        self.arena: Arena | None = None
        self.slot: int | None = None
        self._recorder: EpisodeRecorder | None = None
        if policy.recorder is not None:
            self._recorder = policy.recorder.episode(door, client)
        self._state: Arrays = {}  # each (1, *shape); empty before the first step, and if the arena has the state

    def use(self, arena: Arena) -> None:
        """Keep the state in `arena`, before the first step."""
        self.arena, self.slot = arena, arena.keep()

    async def act(self, tensors: Arrays, patience_ns: int = 0) -> Acted:
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
        self.steps += 1
        return acted

    async def _run(self, tensors: Arrays, patience_ns: int) -> Acted:
        seed = None if self.seed is None else step_seed(self.seed, self.steps + 1)
        state = self._state
        if self.arena is not None and self.slot is not None and self.steps:
            state = self.arena.state(self.slot)
        options = (1, self.exploration, seed, patience_ns)
        return await self.admission.act(self.policy, tensors | state, *options, self.step_recorder())

    def step_recorder(self) -> StepRecorder | None:
        """The recorder of the next step."""
        return None if self._recorder is None else self._recorder.step(self.steps + 1)

    def _keep(self, acted: Acted) -> None:
        # `state_after` copies: a view would keep the array of the whole batch in memory.
        state = self.policy.state_after(acted)
        if self.arena is not None and self.slot is not None:
            self.arena.set_state(self.slot, state)
        else:
            self._state = state
        committed(acted.recorder)

    def close(self) -> None:
        """Free the state."""
        if self.chunks is not None:
            self.chunks.close()
        if self.arena is not None:
            self.arena.forget(self.slot)
