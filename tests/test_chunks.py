"""Policies that plan chunks of actions, handed out action by action."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from websockets.sync.client import connect

from actserve import RemotePolicy, Stream
from actserve.cli.tools import local_service as local
from actserve.client import operations
from actserve.client.operations import SessionStep
from actserve.core.errors import CaptureFailed, InvalidRequest, ServiceError
from actserve.core.signature import Arrays, Chunk, Signature, State, TensorSpec
from actserve.engine.policy import Acted
from actserve.server.chunk_steps import ChunkSteps
from actserve.server.protocols.robots.packed import of_openpi, pack, unpack
from actserve.server.sessions.chunk_state import by_action, take_action
from actserve_export import PolicySource
from actserve_export.capture import capture
from tests.exported import exported
from tests.policies import Ahead

HORIZON, EXECUTE = 8, 6
SIGNATURE = Signature(
    observations=(TensorSpec("time", "float32", ()),),
    outputs=(TensorSpec("actions", "float32", (HORIZON, 2)),),
    max_batch=1,
    chunk=Chunk("actions", EXECUTE),
)


class Planner:
    """Plans (tick of the observation, tick of the action), and notes when it began and what was adopted."""

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.adopted: list[int] = []
        self.error: Exception | None = None
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def run(self, tick: int) -> Acted:
        self.ran.append(tick)
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error
        plan = np.array([[[tick, tick + i] for i in range(HORIZON)]], np.float32)
        return Acted({"actions": plan}, None, 1, 2)

    def adopt(self, acted: Acted) -> None:
        self.adopted.append(int(acted.outputs["actions"][0, 0, 0]))


async def steps(chunks: ChunkSteps, planner: Planner, ticks: range, begins: tuple[int, ...] = ()) -> list[list[float]]:
    found = []
    for tick in ticks:
        acted = await chunks.step(lambda: planner.run(tick), planner.adopt, tick in begins)  # noqa: B023
        assert acted.outputs["actions"].shape == (1, 2)
        found.append(acted.outputs["actions"][0].tolist())
    return found


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_the_policy_runs_ahead_and_its_chunk_is_used_from_a_step_that_does_not_depend_on_time(ahead: int) -> None:
    async def scenario() -> None:
        planner, chunks = Planner(), ChunkSteps(SIGNATURE, ahead)
        found = await steps(chunks, planner, range(40))
        cycle = EXECUTE - ahead
        assert planner.ran == list(range(0, 40, cycle))
        for tick, (seen, planned_for) in enumerate(found):
            assert planned_for == tick
            assert seen == max(0, (tick - ahead) // cycle * cycle if tick >= EXECUTE else 0)
        assert planner.adopted == sorted({int(seen) for seen, _ in found})
        chunks.close()

    asyncio.run(scenario())


def test_a_new_episode_forgets_what_was_planned() -> None:
    async def scenario() -> None:
        planner, chunks = Planner(), ChunkSteps(SIGNATURE, 3)
        await steps(chunks, planner, range(5))
        found = await steps(chunks, planner, range(5, 8), begins=(5,))
        assert found == [[5, 5], [5, 6], [5, 7]]
        assert planner.ran == [0, 3, 5]
        chunks.close()

    asyncio.run(scenario())


def test_a_step_that_fails_was_not_taken() -> None:
    async def scenario() -> None:
        planner, chunks = Planner(), ChunkSteps(SIGNATURE, 2)
        await steps(chunks, planner, range(4))
        planner.error = InvalidRequest("no")
        await steps(chunks, planner, range(4, 6))  # it failed meanwhile, and its chunk was not needed yet
        with pytest.raises(InvalidRequest):
            await steps(chunks, planner, range(6, 7))
        planner.error = None
        assert await steps(chunks, planner, range(6, 8)) == [[6, 6], [6, 7]]
        assert planner.adopted == [0, 6]

    asyncio.run(scenario())


def test_what_is_too_early_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"at most half of the 6 actions .* got 4"):
        ChunkSteps(SIGNATURE, 4)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with local.serve(exported("tests.policies:planner", ("onnx",)).root, "--runtime", "onnx") as service:
        yield service.url


def test_a_stream_hands_out_one_action_for_each_observation(url: str) -> None:
    times = [np.array([float(tick)], np.float32) for tick in range(2 * Ahead.HORIZON)]
    with Stream(url, "planner", chunk="step", ahead=4) as stream:
        assert stream.signature.action.shape == (1,)
        found = [stream.act(time) for time in times]
        assert [float(action[0]) for action in found] == list(range(2 * Ahead.HORIZON))
    with Stream(url, "planner") as stream:
        assert stream.act(times[3]).tolist() == [[3.0 + i] for i in range(Ahead.HORIZON)]
        assert stream.signature.chunk == Chunk("actions", Ahead.EXECUTE, 0.01)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"chunk": "steps"}, "expected chunk=whole, or chunk=step"),
        ({"chunk": "step", "ahead": 13}, "at most half of the 25 actions"),
        ({"chunk": "step", "ahead": -1}, "expected chunk=whole, or chunk=step and the steps in ahead; got .*ahead=-1"),
    ],
)
def test_a_stream_says_what_is_wrong(url: str, query: Any, message: str) -> None:
    with pytest.raises(ServiceError, match=message), Stream(url, "planner", **query):
        pass


def test_a_client_sees_that_a_policy_plans(url: str) -> None:
    with RemotePolicy(url, "planner") as remote:
        assert remote.signature.chunk == Chunk("actions", Ahead.EXECUTE, 0.01)
        assert remote.act(np.zeros(1, np.float32)).shape == (Ahead.HORIZON, 1)


def test_a_chunk_that_no_output_is_is_refused() -> None:
    module = TensorDictModule(torch.nn.Linear(2, 3), in_keys=["observation"], out_keys=["action"])
    for chunk in (Chunk("plan", 1), Chunk("action", 4)):
        source = PolicySource(module, TensorDict({"observation": torch.zeros(2)}), chunk=chunk)
        with pytest.raises(CaptureFailed, match=r"as the chunk says; got action float32\[3\]"):
            capture(source)


def test_a_session_hands_out_one_action_with_each_step(url: str) -> None:
    times = [np.array([float(tick)], np.float32) for tick in range(30)]
    with RemotePolicy(url, "planner") as remote:
        with remote.session(chunk="step") as session:
            assert [session.act(time).tolist() for time in times] == [[tick] for tick in range(30)]
            again = remote.run(
                operations.step(
                    remote.description, {"time": times[0]}, (), session_step=SessionStep(session.id, 30, by_action=True)
                )
            )
            assert again.outputs["actions"].tolist() == [29], "the stored answer of the last step"
        with remote.session() as session:
            assert session.act(times[7]).tolist() == [[7.0 + i] for i in range(Ahead.HORIZON)]


def test_a_session_takes_what_was_planned_until_it_is_time(url: str) -> None:
    """The observation of a step between two chunks has no effect: the policy does not run."""
    with RemotePolicy(url, "planner") as remote, remote.session(chunk="step") as session:
        far = np.array([1000.0], np.float32)
        planned = range(1, Ahead.EXECUTE)
        found = [float(session.act(far if tick in planned else far * 0 + tick)[0]) for tick in range(30)]
        assert found == list(range(30))


def test_sessions_of_other_policies_hand_out_no_chunks() -> None:
    with pytest.raises(InvalidRequest, match="expected a policy that plans chunks of actions"):
        by_action(Signature(SIGNATURE.observations, (TensorSpec("action", "int64", ()),), 1))
    ensemble = Signature(SIGNATURE.observations, SIGNATURE.outputs, 1, chunk=Chunk("actions", 1, ensemble=0.01))
    with pytest.raises(InvalidRequest, match=r"the mean of all chunks, .*: use a stream"):
        by_action(ensemble)


def test_a_new_episode_in_a_session_plans_anew() -> None:
    state = State(TensorSpec("hidden", "float32", (1,)), "next_hidden")
    signature = Signature(SIGNATURE.observations, SIGNATURE.outputs, 1, (state,), is_init=True, chunk=SIGNATURE.chunk)
    seen = []

    async def run(inputs: Arrays) -> Acted:
        seen.append({name: array.tolist() for name, array in inputs.items()})
        now = inputs["time"][0]
        plan = np.array([[[now + i, 0] for i in range(HORIZON)]], np.float32)
        return Acted({"actions": plan, "hidden": inputs["time"][:, None]}, None, 1, 2)

    async def scenario() -> None:
        kept: Arrays = {}
        for tick in range(8):
            flags = {"is_init": np.array([tick == 3])}
            inputs = {"time": np.array([tick], np.float32)} | flags | kept
            acted = await take_action(signature, inputs, run)
            assert acted.outputs["actions"].tolist() == [[tick, 0]]
            kept = {part.spec.name: acted.outputs[part.spec.name] for part in by_action(signature).state}
        assert [(call["time"], call.get("hidden")) for call in seen] == [([0.0], None), ([3.0], [[0.0]])]

    asyncio.run(scenario())


def test_a_robot_gets_one_action_for_each_observation_if_its_url_says_so(url: str) -> None:
    address = url.replace("http", "ws") + "/policies/planner/openpi?chunk=step&ahead=3"
    with connect(address, proxy=None, compression=None) as socket:
        unpack(socket.recv(decode=False))
        for tick in range(60):
            socket.send(pack({"time": np.array([tick], np.float32)}, of_openpi))
            answer = unpack(socket.recv(decode=False))
            assert answer["action"].tolist() == [tick]
            assert answer["actions"].tolist() == [[tick]]
