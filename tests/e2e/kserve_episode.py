"""An episode through kserve's inference client; run by `test_kserve.py` with a Python that has kserve.

python kserve_episode.py URL SEED STEPS prints, as JSON, the action values of each way to act, and what an error says.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

MODEL = "gru"


def tensor(name: str, array: Any, binary: bool) -> InferInput:
    made = InferInput(name, list(array.shape), {"float32": "FP32", "bool": "BOOL"}[array.dtype.name])
    made.set_data_from_numpy(array, binary_data=binary)
    return made


class Episode:
    """Steps on one `url`; `values` are the action values of each."""

    def __init__(self, client: InferenceRESTClient, url: str, observations: Any) -> None:
        self.client = client
        self.url = url
        self.observations = observations  # (STEPS, 1, 4) float32

    async def infer(self, inputs: list[InferInput], **rest: Any) -> Any:
        return await self.client.infer(self.url, InferRequest(MODEL, inputs, **rest), MODEL)

    async def carried(self, binary: bool) -> list[Any]:
        """The client carries the state."""
        state: list[InferInput] = []
        values = []
        for observation in self.observations:
            asked = {"parameters": {"binary_data_output": True}} if binary else {}
            response = await self.infer([tensor("observation", observation, binary), *state], **asked)
            outputs = {output.name: output.as_numpy() for output in response.outputs}
            state = [tensor("recurrent_state", outputs["recurrent_state"], binary)]
            values.append(outputs["action_value"].tolist())
        return values

    async def sequence(self, id_: int | str) -> list[Any]:
        """The service holds the state."""
        values = []
        for step, observation in enumerate(self.observations):
            last = step == len(self.observations) - 1
            parameters = {"sequence_id": id_, "sequence_start": step == 0, "sequence_end": last}
            wanted = [RequestedOutput("action_value", {"binary_data": step % 2 == 0}), RequestedOutput("action")]
            inputs = [tensor("observation", observation, step % 3 == 0)]
            response = await self.infer(inputs, parameters=parameters, request_outputs=wanted, request_id=str(step))
            assert response.id == str(step)
            values.append(response.outputs[0].as_numpy().tolist())
        return values


async def main(url: str, seed: int, steps: int) -> dict[str, Any]:
    observations = np.random.default_rng(seed).standard_normal((steps, 1, 4)).astype(np.float32)
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        episode = Episode(client, url, observations)
        try:
            await episode.infer([tensor("observation", observations[0], True)], parameters={"sequence_id": 9})
            error = ""
        except Exception as refused:
            error = str(refused)
        return {
            "ready": [
                await client.is_server_live(url),
                await client.is_server_ready(url),
                await client.is_model_ready(url, MODEL),
                await client.is_model_ready(url, "chess"),
            ],
            "error": error,
            "values": [
                await episode.carried(binary=True),
                await episode.carried(binary=False),
                await episode.sequence(7),
                await episode.sequence("7"),
            ],
        }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))))
