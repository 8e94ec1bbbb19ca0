"""Metrics and logs of the whole application, with `pong` as it ships."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from actserve.core.settings import Settings
from actserve.server.access.tokens import add_token
from actserve.server.app import create_app
from actserve.telemetry.counts import KEPT_VERSIONS, Counts, ProgramLabels
from actserve.telemetry.logs import JsonFormatter
from tests.asgi import Answer, Caller
from tests.shipped import SHIPPED

SCREEN = bytes(100_800)
RAW = {"Content-Type": "application/octet-stream"}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def running(**changes: Any) -> Caller:
    return Caller(create_app(Settings.model_validate({"store": str(SHIPPED), "runtime": "onnx", **changes})))


def ready(call: Caller) -> Caller:
    call.wait(lambda: not call.app.state.registry.loading)
    return call


@pytest.fixture(scope="module")
def service() -> Iterator[Caller]:
    with running() as call:
        yield ready(call)


def act(call: Caller, path: str = "/act", body: bytes = SCREEN, headers: dict[str, str] | None = None) -> Answer:
    return call("POST", path, body, RAW | (headers or {}))


def scrape(call: Caller, accept: str = "") -> Samples:
    answer = call("GET", "/metrics", headers={"Accept": accept})
    assert answer.status == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.content.decode())
        for sample in family.samples
    }


def grown(before: Samples, after: Samples, name: str) -> dict[str, float]:
    """The value of a counter for each combination of its labels, sorted by name."""
    return {
        ",".join(value for _, value in sorted(labels)): value - before.get((sample, labels), 0)
        for (sample, labels), value in after.items()
        if sample == name and value != before.get((sample, labels), 0)
    }


def test_requests_and_refusals_are_counted_by_policy_route_and_status(service: Caller) -> None:
    before = scrape(service)
    act(service)
    act(service, "/policies/pong/act", SCREEN * 3)
    act(service, "/policies/pong/versions/1/act", b"short")
    act(service, "/policies/made-up/act")
    service("GET", "/nothing/of/this/kind")
    service("POST", "/v2/models/pong/infer", b"nonsense")
    service("GET", "/v2/nothing")
    after = scrape(service)
    assert grown(before, after, "actserve_requests_total") == {
        "200,pong,/policies/{name}/act,http": 2,
        "422,pong,/policies/{name}/versions/{version}/act,http": 1,
        "404,,/policies/{name}/act,http": 1,
        "404,,,http": 1,
        "400,pong,/v2/models/{name}/infer,http": 1,
        "404,,/v2/{rest:path},http": 1,
        "200,,/metrics,http": 1,
    }
    refused = grown(before, after, "actserve_refused_total")
    reasons = sorted(key.split(",")[1] for key in refused)
    assert reasons == ["invalid_tensor", "malformed_body", "no_such_route", "no_such_route", "unknown_policy"]
    assert grown(before, after, "actserve_actions_total") == {"pong,onnx,1": 4}
    assert grown(before, after, "actserve_batch_size_count")["pong,onnx,1"] in (
        2,
        3,
        4,
    )  # calls, by the fastest batch size here
    assert grown(before, after, "actserve_batch_size_sum") == {"pong,onnx,1": 4}
    assert 2 <= grown(before, after, "actserve_queue_seconds_count")["pong,onnx,1"] <= 4
    assert 0 < grown(before, after, "actserve_inference_seconds_sum")["pong,onnx,1"] < 10


def test_what_the_gate_refuses_is_counted_with_its_reason(tmp_path: Path) -> None:
    add_token(tmp_path / "tokens", "me")
    with running(tokens=tmp_path / "tokens", public_metrics=True) as service:
        assert act(service).status == 401
        assert grown({}, scrape(service), "actserve_refused_total") == {",unauthorized,,http": 1}


def test_what_is_now(service: Caller) -> None:
    before = scrape(service)
    begun = service("POST", "/policies/pong-lstm/sessions").document["session"]
    after = scrape(service)
    assert grown(before, after, "actserve_sessions") == {"": 1}
    service("DELETE", f"/policies/pong-lstm/sessions/{begun}")
    now = {(name, dict(labels).get("policy")): value for (name, labels), value in scrape(service).items()}
    assert now["actserve_policy_info", "pong"] == now["actserve_policy_info", "pong-lstm"] == 1
    assert now["actserve_waiting", "pong"] == now["actserve_sessions", None] == now["actserve_streams", None] == 0
    assert now["process_resident_memory_bytes", None] > 10e6
    assert now["actserve_loop_lag_seconds_count", None] > 0
    assert now["actserve_loop_lag_max_seconds", None] > 0


def test_what_is_told_of_versions_stays_small_however_many_there_have_been() -> None:
    counts = Counts()
    held = counts.meters(ProgramLabels("pong", 1, "onnx"))  # a batcher's, that runs on
    counts.meters(ProgramLabels("breakout", 1, "onnx"))
    for version in range(2, 201):
        counts.meters(ProgramLabels("pong", version, "onnx")).sizes.add(version)
    assert counts.meters(ProgramLabels("pong", 1, "onnx")) is held
    assert sorted(counts.programs) == [
        ProgramLabels("breakout", 1, "onnx"),
        ProgramLabels("pong", 1, "onnx"),
        *(ProgramLabels("pong", version, "onnx") for version in range(202 - KEPT_VERSIONS, 201)),
    ]
    assert counts.meters(ProgramLabels("pong", 200, "onnx")).sizes.total == 200


def test_what_is_counted_is_told_while_the_sessions_file_cannot_be_used(tmp_path: Path) -> None:
    with running(counts=tmp_path / "counts") as service:
        service.app.state.sessions._file.close()
        seen = service.app.state.metrics._history
        service.wait(lambda: len(seen) > 2)  # it goes on publishing
        names = {name for name, _ in scrape(service)}
    assert "actserve_streams" in names
    assert "actserve_sessions" not in names


def test_a_service_whose_counts_are_gone_ends_as_it_should(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running(counts=tmp_path / "counts"):
        (tmp_path / "counts").unlink()
    assert "this worker's counts could not be written" in caplog.text


def test_counts_that_cannot_be_read_are_an_error_that_passes(tmp_path: Path) -> None:
    with running(counts=tmp_path / "counts") as service:
        moved = (tmp_path / "counts").rename(tmp_path / "away")
        (tmp_path / "counts").mkdir()
        refused = service("GET", "/metrics")
        assert (refused.status, refused.document["error"]["code"]) == (503, "metrics_unavailable")
        (tmp_path / "counts").rmdir()
        moved.rename(tmp_path / "counts")
        assert service("GET", "/metrics").status == 200


def test_openmetrics_for_who_asks_for_it(service: Caller) -> None:
    plain = service("GET", "/metrics")
    open_ = service("GET", "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert plain.headers["content-type"].startswith("text/plain; version=")
    assert open_.headers["content-type"].startswith("application/openmetrics-text")
    assert open_.content.endswith(b"# EOF\n")


def test_the_statistics_of_one_policy(service: Caller) -> None:
    before = service("GET", "/policies/pong/stats").document
    for _ in range(3):
        act(service, body=SCREEN * 2)
    act(service, body=b"short")
    after = service("GET", "/policies/pong/stats").document
    assert after["actions"] - before["actions"] == 6
    assert after["requests"] - before["requests"] == 5  # one of them was for the statistics
    assert after["refused"] - before["refused"] == 1
    assert after["rate"] > 0
    assert after["batch_size"]["buckets"]["2"] - before["batch_size"]["buckets"].get("2", 0) == 3
    for times in (after["queue_ms"], after["inference_ms"]):
        assert 0 < times["p50"] <= times["p99"] < 10_000
    fresh = service("GET", "/policies/pong-lstm/stats").document
    assert (fresh["actions"], fresh["batch_size"], fresh["queue_ms"]) == (
        0,
        {"mean": None, "buckets": {}},
        {"p50": None, "p99": None},
    )
    unknown = service("GET", "/policies/nobody/stats")
    assert (unknown.status, unknown.document["error"]["code"]) == (404, "unknown_policy")


def test_every_answer_has_its_request_id(service: Caller) -> None:
    assert act(service, headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert act(service, body=b"short", headers={"X-Request-Id": "mine-2"}).headers["x-request-id"] == "mine-2"
    made = service("GET", "/nothing", headers={"X-Request-Id": "not one"}).headers["x-request-id"]
    assert len(made) == 16


def test_a_failure_is_counted_and_logged_under_its_id(service: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ZeroDivisionError(name)

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(JsonFormatter().format(record))  # type: ignore[method-assign]
    logger = logging.getLogger("actserve")
    before = scrape(service)
    monkeypatch.setattr(service.app.state.registry, "describe", fail)
    with pytest.raises(ZeroDivisionError):  # for the server to log
        service("GET", "/policies/pong")
    monkeypatch.undo()
    assert grown(before, scrape(service), "actserve_requests_total")["500,pong,/policies/{name},http"] == 1

    policy = service.app.state.registry.live[0]
    monkeypatch.setattr(policy.batcher, "_run", fail)
    logger.addHandler(handler)
    try:
        assert act(service, headers={"X-Request-Id": "mine-3"}).status == 500
    finally:
        logger.removeHandler(handler)
    assert [json.loads(line)["request"] for line in lines] == ["mine-3"]


def test_the_access_log_tells_each_request(caplog: pytest.LogCaptureFixture) -> None:
    with running(access_log=True) as call, caplog.at_level("INFO", "actserve.access"):
        ready(call)
        act(call, "/policies/nobody/act")
        call("GET", "/healthz")
    first, second = (vars(record) for record in caplog.records if record.name == "actserve.access")
    assert (first["method"], first["path"], first["status"]) == ("POST", "/policies/nobody/act", 404)
    assert (first["reason"], second["status"]) == ("unknown_policy", 200)
    assert "reason" not in second
    assert 0 < second["duration_ms"] < 10_000


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ExportTraceServiceRequest]]:
    """An OTLP collector, and the environment that leads to it."""
    received: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces"
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield received
        server.shutdown()
        thread.join()


def test_a_request_is_a_span_with_its_queue_and_its_inference_below(
    collector: list[ExportTraceServiceRequest],
) -> None:
    with running() as call:
        ready(call)
        parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        act(call, "/policies/pong/act", headers={"traceparent": parent, "X-Request-Id": "mine"})
        act(call, "/policies/nobody/act")
        call("GET", "/healthz")
    spans = [s for r in collector for rs in r.resource_spans for ss in rs.scope_spans for s in ss.spans]
    by_name = {span.name: span for span in spans if span.trace_id.hex() == "4bf92f3577b34da6a3ce929d0e0e4736"}
    request, queue, inference = (by_name[name] for name in ("POST /policies/{name}/act", "queue", "inference"))
    assert request.parent_span_id.hex() == "00f067aa0ba902b7"
    assert queue.parent_span_id == inference.parent_span_id == request.span_id
    assert queue.end_time_unix_nano == inference.start_time_unix_nano
    slack_ns = 1_000_000  # two clocks
    assert request.start_time_unix_nano - slack_ns < queue.start_time_unix_nano
    assert queue.start_time_unix_nano < inference.end_time_unix_nano < request.end_time_unix_nano + slack_ns
    told = {a.key: a.value.string_value or a.value.int_value for a in request.attributes}
    assert told["actserve.policy"] == "pong"
    assert told["actserve.request_id"] == "mine"
    assert told["http.response.status_code"] == 200
    others = [span for span in spans if span.name not in by_name or span not in by_name.values()]
    assert len(others) == 1  # no probe
    refused = {a.key: a.value.string_value for a in others[0].attributes}
    assert refused["actserve.reason"] == "unknown_policy"
    services = {a.value.string_value for r in collector[0].resource_spans for a in r.resource.attributes}
    assert "actserve" in services
