"""LitServe: FastAPI in one process, inference in another, queues between them.

No `from __future__ import annotations` here: LitServe looks at the annotations as they are, and takes a body for JSON
when it does not find `Body` there.
"""

from typing import Annotated, Any

import litserve
from fastapi import Body

from tests.benchmarks.peers.program import BATCH, PORT, load

WAIT_S = 0.001  # for a batch to fill


class Policy(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self._act = load()

    def decode_request(self, request: Annotated[bytes, Body()]) -> bytes:
        return request

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return inputs

    def predict(self, x: Any) -> Any:
        return self._act([x])[0] if BATCH == 1 else self._act(x)

    def unbatch(self, output: list[int]) -> list[int]:
        return output

    def encode_response(self, output: int) -> dict[str, int]:
        return {"action": output}


if __name__ == "__main__":
    api = Policy(max_batch_size=BATCH, batch_timeout=WAIT_S if BATCH > 1 else 0.0)
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1)
    server.run(
        host="127.0.0.1",
        port=PORT,
        num_api_servers=1,
        generate_client_file=False,
        log_level="error",
        access_log=False,
    )
