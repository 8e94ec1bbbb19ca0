"""mosec: an HTTP server in Rust, and a Python process that it sends batches to."""

from __future__ import annotations

import sys
from typing import Any

from mosec import Server, Worker

from tests.benchmarks.peers.program import BATCH, PORT, load

WAIT_MS = 1  # for a batch to fill: the least that mosec takes, as 0 means its default of 10


class Policy(Worker):
    def __init__(self) -> None:
        super().__init__()
        self._act = load()

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: Any) -> Any:
        if BATCH == 1:
            return self._act([data])[0]
        return self._act(data)

    def serialize(self, data: int) -> bytes:
        return b'{"action":%d}' % data


if __name__ == "__main__":
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", str(PORT), "--log-level", "error"]
    server = Server()
    server.append_worker(Policy, num=1, max_batch_size=BATCH, max_wait_time=WAIT_MS)
    server.run()
