"""json-numpy with requests, as OpenVLA's users have it. The service keeps the state, in a session."""

from __future__ import annotations

from typing import Any

import json_numpy
import requests

from tests.e2e.robots.episode import main

json_numpy.patch()


class JsonNumpy:
    def __init__(self, port: int, token: str) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self._http = requests.Session()
        self._http.headers["Authorization"] = f"Bearer {token}"
        begun = self._post("/policies/robot/sessions", None)
        self._http.headers["X-Session"] = begun["session"]

    def act(self, observation: dict[str, Any]) -> Any:
        named = {f"observation.{name}": value for name, value in observation.items()}
        return self._post("/act", {**named, "prompt": "pick up the cup"})

    def close(self) -> None:
        self._http.close()

    def _post(self, path: str, document: Any) -> Any:
        response = self._http.post(self._url + path, json=document, timeout=60)
        if not response.ok:
            raise RuntimeError(f"{response.status_code}: {response.text}")
        return response.json()


if __name__ == "__main__":
    main(JsonNumpy)
