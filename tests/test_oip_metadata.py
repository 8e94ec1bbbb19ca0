from __future__ import annotations

from collections.abc import Iterator

import pytest

from actserve import __version__
from actserve.core.settings import Settings
from actserve.server.app import create_app
from actserve.store.artifact import MANIFEST
from actserve.store.local import ModelStore
from tests.asgi import Caller
from tests.publishing import republish


@pytest.fixture
def call(own_store: ModelStore) -> Iterator[Caller]:
    """The service with `cart`@1, 2 and 3; the last one was never finished."""
    for _ in range(2):
        republish(own_store.resolve("cart"), own_store)
    (own_store.root / "cart" / "3" / MANIFEST).unlink()
    with Caller(create_app(Settings(store=own_store.root, runtime="onnx"))) as caller:
        caller.wait(lambda: not caller.app.state.registry.loading)
        yield caller


def test_the_server_says_what_it_is_and_that_it_is_ready(call: Caller) -> None:
    server = call("GET", "/v2").document
    assert (server["name"], server["version"]) == ("actserve", __version__)
    assert {"binary_tensor_data", "sequence", "sequence(string_id)", "statistics"} <= set(server["extensions"])
    assert call("GET", "/v2/").document == server
    assert call("GET", "/v2/health/live").document == {"live": True}
    assert call("GET", "/v2/health/ready").document == {"ready": True}


def test_a_model_says_what_it_takes_and_gives(call: Caller) -> None:
    model = {
        "name": "cart",
        "versions": ["1", "2"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "observation", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [
            {"name": "action", "datatype": "INT64", "shape": [-1]},
            {"name": "action_value", "datatype": "FP32", "shape": [-1, 3]},
        ],
    }
    assert call("GET", "/v2/models/cart").document == model
    assert call("GET", "/v2/models/cart/versions/1").document == model
    config = call("GET", "/v2/models/cart/config").document
    assert config["input"] == [{"name": "observation", "data_type": "TYPE_FP32", "dims": [4], "optional": False}]
    assert config["max_batch_size"] > 1
    assert call("GET", "/v2/models/cart/ready").document == {"name": "cart", "ready": True}
    assert call("GET", "/v2/models/cart/versions/1/ready").status == 200
    for version, status in (("3", 503), ("4", 404), ("x", 404)):
        assert call("GET", f"/v2/models/cart/versions/{version}/ready").status == status


def test_the_repository_lists_every_version_and_its_state(call: Caller) -> None:
    listed = call("POST", "/v2/repository/index").document
    assert [(entry["version"], entry["state"]) for entry in listed] == [
        ("1", "UNKNOWN"),
        ("2", "READY"),
        ("3", "UNAVAILABLE"),
    ]
    assert "cut short" in listed[2]["reason"]
    ready = [{"name": "cart", "version": "2", "state": "READY", "reason": ""}]
    assert call("POST", "/v2/repository/index", {"ready": True}).document == ready
    assert call("POST", "/v2/repository/index", {"ready": False}).document == listed


def test_a_version_may_be_asked_for(call: Caller) -> None:
    request = {"inputs": [{"name": "observation", "datatype": "FP32", "shape": [1, 4], "data": [[0, 0.5, 1, -1e9]]}]}
    for path, version in (("", "2"), ("/versions/1", "1"), ("/versions/2", "2")):
        answer = call("POST", f"/v2/models/cart{path}/infer", request).document
        assert answer["model_version"] == version
        assert [output["shape"] for output in answer["outputs"]] == [[1], [1, 3]]
    counted = call("GET", "/v2/models/stats").document["model_stats"]
    assert [(entry["version"], entry["inference_stats"]["success"]["count"]) for entry in counted] == [("2", 2)]


def test_the_routes_are_documented(call: Caller) -> None:
    paths = call("GET", "/openapi.json").document["paths"]
    assert "sequence_start" in paths["/v2/models/{name}/infer"]["post"]["description"]
    assert [p["name"] for p in paths["/v2/models/{name}/versions/{version}"]["get"]["parameters"]] == [
        "name",
        "version",
    ]
    assert call("GET", "/nothing").document["error"]["code"] == "no_such_route", "the other routes keep their errors"
    assert call("DELETE", "/policies/cart").document["error"]["code"] == "method_not_allowed"
