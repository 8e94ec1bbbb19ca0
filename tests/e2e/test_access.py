"""`actserve serve --tokens`, as an operator and a client type it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import urllib3

from actserve.cli.tools.local_service import serve
from actserve.client.remote_policy import RemotePolicy
from actserve.client.stream import Stream
from actserve.core.errors import ServiceError
from tests.command_line import actserve


def test_a_service_behind_tokens(pong_store: Path, tmp_path: Path) -> None:
    file = str(tmp_path / "tokens")
    token = actserve("tokens", "new", "robot", "--file", file).stdout.strip()
    screen = np.zeros((210, 160, 3), np.uint8)
    with serve(pong_store, "--runtime", "onnx", "--policy", "pong", "--tokens", file, "--workers", "2") as service:
        with pytest.raises(ServiceError, match="401 unauthorized"), RemotePolicy(service.url):
            pass
        with RemotePolicy(service.url, token=token) as policy:
            action = policy.act(screen)
        with Stream(service.url, token=token) as stream:
            assert stream.act(screen) == action
        answer = urllib3.request("POST", f"{service.url}/act", body=bytes(100_800), retries=False)
        assert answer.status == 401
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "Server" not in answer.headers
        docs = urllib3.request("GET", f"{service.url}/docs", headers={"Authorization": f"Bearer {token}"})
        assert docs.headers["Content-Security-Policy"].startswith("default-src 'self'")
        loaded = subprocess.run(
            [sys.executable, "-m", "actserve", "load", "--url", service.url, "--duration", "0.5", "--json"],
            env={**os.environ, "ACTSERVE_TOKEN": token}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        report = json.loads(loaded.stdout)
        assert report["requests"] > 0
        assert not report["errors"]


def test_what_is_wrong_is_said_before_anything_starts(pong_store: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("nonsense\n")
    result = actserve("serve", "--store", str(pong_store), "--tokens", str(tmp_path / "tokens"))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "line 1: expected NAME SHA256" in result.stderr
