"""vla-eval: `Connection`, with images in PNG."""

from __future__ import annotations

import asyncio
from typing import Any

import vla_eval.connection

from tests.e2e.robots.episode import main


class VlaEval:
    """The client takes a token as the password in the URL."""

    def __init__(self, port: int, token: str) -> None:
        self._runner = asyncio.Runner()
        url = f"ws://robot:{token}@127.0.0.1:{port}/vla-eval"
        self._connection = vla_eval.connection.Connection(url, max_retries=1)
        self._runner.run(self._connection.connect(benchmark="mine"))
        self._runner.run(self._connection.start_episode({"name": "cup"}))

    def act(self, observation: dict[str, Any]) -> Any:
        images = {f"observation_{name}": value for name, value in observation.items() if name != "state"}
        seen = {"images": images, "task_description": "pick up the cup"}
        if "state" in observation:
            seen["observation"] = {"state": observation["state"]}
        return self._runner.run(self._connection.act(seen))["actions"]

    def close(self) -> None:
        self._runner.run(self._connection.end_episode({"success": True}))
        self._runner.run(self._connection.close())


if __name__ == "__main__":
    main(VlaEval)
