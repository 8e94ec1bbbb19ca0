"""NVIDIA Triton by pytriton: its HTTP server and batcher in C++, the inference in a Python process beside it.

Triton's own ONNX backend is not to be had from a package index.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from tests.benchmarks.peers.program import BATCH, PORT, SCREEN, load

act = load()


@batch
def infer(pixels: Any) -> dict[str, Any]:
    return {"action": np.array(act([pixels]), np.int64)[:, None]}


if __name__ == "__main__":
    config = TritonConfig(http_address="127.0.0.1", http_port=PORT, allow_grpc=False, allow_metrics=False)
    with Triton(config=config) as triton:
        triton.bind(
            model_name="pong",
            infer_func=infer,
            inputs=[Tensor(name="pixels", dtype=np.uint8, shape=SCREEN)],
            outputs=[Tensor(name="action", dtype=np.int64, shape=(1,))],
            config=ModelConfig(max_batch_size=BATCH, batcher=DynamicBatcher(max_queue_delay_microseconds=500)),
        )
        triton.serve()
