"""BentoML, started by `bentoml serve`: one worker process, a raw body in, JSON out.

BentoML batches arrays, and takes them as JSON. So the body's schema says "string" here: that is
handed over as it came, and a validator makes it an array.
"""

from __future__ import annotations

from typing import Annotated, Any

import bentoml
import numpy as np
from pydantic import BeforeValidator, InstanceOf, WithJsonSchema

from tests.benchmarks.peers.program import BATCH, SCREEN, load


def screen(body: bytes) -> Any:
    return np.frombuffer(body, np.uint8).reshape(1, *SCREEN)


Screen = Annotated[InstanceOf[np.ndarray], BeforeValidator(screen), WithJsonSchema({"type": "string"})]


@bentoml.service(workers=1, traffic={"timeout": 30}, metrics={"enabled": False}, logging={"access": {"enabled": False}})
class Policy:
    def __init__(self) -> None:
        self._act = load()

    @bentoml.api(**({"batchable": True, "max_batch_size": BATCH, "max_latency_ms": 1000} if BATCH > 1 else {}))
    async def act(self, screens: Screen, /) -> list[int]:
        return self._act([screens.data])
