"""`/act` over real sockets, with the bundled policy."""

from __future__ import annotations

import base64
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3

from actserve.cli.tools import local_service as local
from actserve.cli.tools.local_service import LocalService
from actserve.client.remote_policy import RemotePolicy
from actserve.core.signature import Array
from actserve.store.artifact import Program
from actserve.store.local import ModelStore
from tests.publishing import republish

RAW = {"Content-Type": "application/octet-stream"}
JSON = {"Content-Type": "application/json"}
SCREEN_BYTES = 210 * 160 * 3


@pytest.fixture(scope="module")
def http() -> urllib3.PoolManager:
    return urllib3.PoolManager(retries=False, timeout=120)


def post(http: urllib3.PoolManager, url: str, body: bytes, headers: dict[str, str] = RAW) -> tuple[int, dict[str, Any]]:
    response = http.request("POST", url, body=body, headers=headers)
    return response.status, json.loads(response.data)


def test_both_runtimes_agree_on_512_screens_however_they_are_posted(
    both: dict[str, LocalService], screens: Array
) -> None:
    actions = {}
    for runtime, service in both.items():
        singly = _singly(service, screens)
        in_sevens = _in_batches(service, screens, 7)
        in_large = _in_batches(service, screens, 256)  # as many as the program takes
        at_once = _from_connections(service, screens, 16)
        np.testing.assert_array_equal(singly, in_sevens)
        np.testing.assert_array_equal(singly, in_large)
        np.testing.assert_array_equal(singly, at_once)
        actions[runtime] = singly
    np.testing.assert_array_equal(actions["onnx"], actions["pt2"])
    assert len(np.unique(actions["onnx"])) > 1, "a policy with one action would agree with itself in any case"


def _singly(service: LocalService, screens: Array) -> Array:
    with RemotePolicy(service.url) as policy:
        return np.array([policy.act(screen) for screen in screens])


def _in_batches(service: LocalService, screens: Array, size: int) -> Array:
    with RemotePolicy(service.url) as policy:
        return np.concatenate([policy.act(screens[i : i + size]) for i in range(0, len(screens), size)])


def _from_connections(service: LocalService, screens: Array, connections: int) -> Array:
    answers = np.full(len(screens), -1)

    def work(first: int) -> None:
        with RemotePolicy(service.url) as policy:
            for index in range(first, len(screens), connections):
                answers[index] = policy.act(screens[index])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_the_three_forms_of_the_route_and_of_the_body_say_the_same(
    service: LocalService, http: urllib3.PoolManager, screens: Array
) -> None:
    screen = screens[100]
    b64 = {"dtype": "uint8", "shape": [210, 160, 3], "b64": base64.b64encode(screen.tobytes()).decode()}
    status, expected = post(http, f"{service.url}/act", screen.tobytes())
    assert status == 200
    assert list(expected) == ["action"]
    for path in ("/policies/pong/act", "/policies/pong/versions/1/act"):
        assert post(http, service.url + path, screen.tobytes()) == (200, expected)
    for value in (screen.tolist(), b64):
        assert post(http, f"{service.url}/act", json.dumps({"pixels": value}).encode(), JSON) == (200, expected)


def test_more_outputs_come_when_asked_for(service: LocalService, http: urllib3.PoolManager, screens: Array) -> None:
    url = f"{service.url}/act?outputs=action,action_value"
    _, one = post(http, url, screens[0].tobytes())
    _, batch = post(http, url, screens[:3].tobytes())
    assert np.shape(one["action_value"]) == (6,)
    assert np.shape(batch["action_value"]) == (3, 6)
    assert np.argmax(one["action_value"]) == one["action"]


def test_a_batch_larger_than_the_program_takes_is_answered(
    service: LocalService, http: urllib3.PoolManager, screens: Array
) -> None:
    _, answer = post(http, f"{service.url}/act", screens[:300].tobytes())
    _, last = post(http, f"{service.url}/act", screens[299].tobytes())
    assert len(answer["action"]) == 300
    assert answer["action"][-1] == last["action"]


BAD_REQUESTS = {
    "wrong length": ("POST", "/act", b"x" * (SCREEN_BYTES - 1), RAW, 422, "invalid_tensor"),
    "a screen and a half": ("POST", "/act", b"x" * (SCREEN_BYTES * 3 // 2), RAW, 422, "invalid_tensor"),
    "empty body": ("POST", "/act", b"", RAW, 422, "invalid_tensor"),
    "50 MB body": ("POST", "/act", bytes(50_000_000), RAW, 413, "body_too_large"),
    "wrong content type": ("POST", "/act", b"x", {"Content-Type": "text/plain"}, 415, "unsupported_content_type"),
    "no content type": ("POST", "/act", b"x", {}, 415, "unsupported_content_type"),
    "a form, curl's default": (
        "POST",
        "/act",
        b"x",
        {"Content-Type": "application/x-www-form-urlencoded"},
        415,
        "unsupported_content_type",
    ),
    "NaN in JSON": ("POST", "/act", b'{"pixels": [[NaN]]}', JSON, 400, "malformed_body"),
    "not JSON": ("POST", "/act", b"\xff\xfe", JSON, 400, "malformed_body"),
    "empty JSON": ("POST", "/act", b"", JSON, 400, "malformed_body"),
    "a JSON list": ("POST", "/act", b"[1]", JSON, 400, "malformed_body"),
    "no tensor": ("POST", "/act", b"{}", JSON, 422, "invalid_tensor"),
    "unknown tensor": ("POST", "/act", b'{"frame": [1]}', JSON, 422, "invalid_tensor"),
    "wrong shape": ("POST", "/act", b'{"pixels": [[1, 2], [3, 4]]}', JSON, 422, "invalid_tensor"),
    "unknown output": ("POST", "/act?outputs=value", bytes(SCREEN_BYTES), RAW, 422, "unknown_output"),
    "no such answer": ("POST", "/act", bytes(SCREEN_BYTES), {**RAW, "Accept": "text/html"}, 406, "not_acceptable"),
    "unknown policy": ("POST", "/policies/chess/act", bytes(SCREEN_BYTES), RAW, 404, "unknown_policy"),
    "a path as a policy": ("POST", "/policies/..%2f..%2fetc/act", bytes(SCREEN_BYTES), RAW, 404, "no_such_route"),
    "unknown version": ("POST", "/policies/pong/versions/7/act", bytes(SCREEN_BYTES), RAW, 404, "unknown_version"),
    "a version that is no number": ("POST", "/policies/pong/versions/x/act", b"", RAW, 404, "unknown_version"),
    "unknown manifest": ("GET", "/policies/chess", None, {}, 404, "unknown_policy"),
    "wrong method": ("GET", "/act", None, {}, 405, "method_not_allowed"),
    "wrong method on a policy": ("DELETE", "/policies/pong", None, {}, 405, "method_not_allowed"),
    "no such route": ("GET", "/nothing", None, {}, 404, "no_such_route"),
}


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "code"), BAD_REQUESTS.values(), ids=BAD_REQUESTS
)
def test_bad_requests_get_the_agreed_shape_and_harm_nobody(
    service: LocalService,
    http: urllib3.PoolManager,
    screens: Array,
    method: str,
    path: str,
    body: bytes | None,
    headers: dict[str, str],
    status: int,
    code: str,
) -> None:
    response = http.request(method, service.url + path, body=body, headers=headers)
    document = json.loads(response.data)
    assert (response.status, document["error"]["code"]) == (status, code)
    assert document["error"].keys() == {"code", "message", "detail"}
    assert document["error"]["message"]
    assert "Traceback" not in response.data.decode()
    assert post(http, f"{service.url}/act", screens[0].tobytes())[0] == 200


def test_what_is_served_can_be_read(service: LocalService, http: urllib3.PoolManager) -> None:
    listed = json.loads(http.request("GET", f"{service.url}/policies").data)
    described = json.loads(http.request("GET", f"{service.url}/policies/pong").data)
    assert listed["default"] == "pong"
    assert listed["policies"][0]["runtime"] == described["runtime"]
    assert described["manifest"]["certificate"]["samples"] >= 64
    assert described["reason"].endswith(f"asked for by --runtime {described['runtime']}")
    assert json.loads(http.request("GET", f"{service.url}/healthz").data) == {"status": "alive"}
    assert http.request("GET", f"{service.url}/readyz").status == 200
    openapi = json.loads(http.request("GET", f"{service.url}/openapi.json").data)
    assert "curl --data-binary @frame.raw" in openapi["paths"]["/act"]["post"]["description"]
    assert http.request("GET", f"{service.url}/docs").status == 200


def test_auto_serves_onnx_where_the_pt2_cannot_run_and_says_why(pong_store: Path, tmp_path: Path) -> None:
    artifact = ModelStore(pong_store).resolve("pong")
    manifest = artifact.manifest
    forged = {**manifest.programs["pt2"].requires, "cpu_flags": ["a_feature_of_tomorrow"]}
    programs = {**manifest.programs, "pt2": Program("policy.pt2", forged)}
    republish(artifact, ModelStore(tmp_path), programs=programs)
    with local.serve(tmp_path) as service, RemotePolicy(service.url) as policy:
        assert policy.runtime == "onnx"
        described = json.loads(urllib3.PoolManager().request("GET", f"{service.url}/policies/pong").data)
        assert "a_feature_of_tomorrow, which this host lacks" in described["reason"]
