"""openpi-client: `WebsocketClientPolicy`."""

from __future__ import annotations

from typing import Any

from openpi_client.websocket_client_policy import WebsocketClientPolicy

from tests.e2e.robots.episode import main


class Openpi:
    def __init__(self, port: int, token: str) -> None:
        self._policy = WebsocketClientPolicy("127.0.0.1", port, api_key=token)
        assert self._policy.get_server_metadata()["policy"] == "robot"

    def act(self, observation: dict[str, Any]) -> Any:
        named = {f"observation/{name}": value for name, value in observation.items()}
        answer = self._policy.infer({**named, "prompt": "pick up the cup"})
        assert answer["server_timing"]["infer_ms"] > 0
        return answer["actions"]

    def close(self) -> None:
        self._policy._ws.close()


if __name__ == "__main__":
    main(Openpi)
