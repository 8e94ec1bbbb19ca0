"""Ray Serve: one proxy and one replica, a raw body in, JSON out."""

from __future__ import annotations

import signal

import ray
from ray import serve
from ray.serve.schema import LoggingConfig
from starlette.requests import Request

from tests.benchmarks.peers.program import PORT, load


class Policy:
    def __init__(self) -> None:
        self._act = load()

    async def __call__(self, request: Request) -> dict[str, int]:
        return {"action": self._act([await request.body()])[0]}


if __name__ == "__main__":
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options=serve.HTTPOptions(host="127.0.0.1", port=PORT))
    deploy = serve.deployment(num_replicas=1, max_ongoing_requests=128, ray_actor_options={"num_cpus": 0})
    serve.run(
        deploy(Policy).bind(), name="pong", route_prefix="/act", logging_config=LoggingConfig(enable_access_log=False)
    )
    signal.pause()
    ray.shutdown()
