from __future__ import annotations

import gzip
import json
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actserve.core.signature import Arrays, Exploration
from tests.asgi import Answer, Caller
from tests.fake_policy import NAME, SLOW, Alone, Versions, seen
from tests.oip import BATCH, INFER, MAX_BODY_BYTES, arrays, error, in_binary, in_json, same, serving


@pytest.fixture
def registry() -> Versions:
    return Versions(SLOW)  # a step can be held up without holding up the event loop


@pytest.fixture
def call(registry: Versions, tmp_path: Path) -> Iterator[Caller]:
    """The routes, with `digest`@1 behind them."""
    with serving(registry, tmp_path) as caller:
        yield caller


def test_state_goes_out_under_the_names_it_comes_in_by(call: Caller) -> None:
    alone = Alone(1, 0, None)
    carried: Arrays = {}
    for x in (3, 1, 4, 1, 5):
        answered = arrays(call("POST", INFER, in_json({**seen(x), **carried})))
        carried = {name: answered.pop(name) for name in ("digest", "odd")}
        same(answered, alone.take(seen(x)))


def step(call: Caller, id_: int | str, x: int, path: str = INFER, **parameters: Any) -> Answer:
    return call("POST", path, in_json(seen(x), parameters={"sequence_id": id_, **parameters}))


def test_sequences_of_both_id_types_hold_their_state(call: Caller) -> None:
    ids: list[int | str] = [1, "1", 2**64 - 1, "a name"]
    alone = {id_: Alone(1, seed, "random") for seed, id_ in enumerate(ids)}
    for number in range(6):
        for seed, id_ in enumerate(ids):
            flags: dict[str, Any] = {"sequence_start": number == 0, "sequence_end": number == 5}
            answer = step(call, id_, number + seed, seed=seed, exploration="random", **flags)
            same(arrays(answer), alone[id_].take(seen(number + seed)))
            assert answer.document["parameters"]["seed"] != seed
    for id_ in ids:
        message = f"no sequence {str(id_)!r} of {NAME}: never begun, ended or timed out"
        assert error(step(call, id_, 1)) == (404, message)


def test_a_start_begins_anew_and_one_request_may_be_the_whole_sequence(call: Caller) -> None:
    for _ in range(2):
        same(arrays(step(call, 7, 3, sequence_start=True)), Alone(1, 0, None).take(seen(3)))
    same(arrays(step(call, "once", 3, sequence_start=True, sequence_end=True)), Alone(1, 0, None).take(seen(3)))
    assert step(call, "once", 3).status == 404


def test_a_sequence_stays_on_its_version(call: Caller, registry: Versions) -> None:
    alone = Alone(1, 0, None)
    same(arrays(step(call, 7, 3, sequence_start=True)), alone.take(seen(3)))
    call.wait(lambda: registry.publish() == 2)
    answer = step(call, 7, 4)
    assert answer.document["model_version"] == "1"
    same(arrays(answer), alone.take(seen(4)))
    same(arrays(step(call, 7, 5, f"/v2/models/{NAME}/versions/1/infer")), alone.take(seen(5)))
    expected = (400, "a sequence stays on its version: expected 1; got 2")
    assert error(step(call, 7, 5, f"/v2/models/{NAME}/versions/2/infer")) == expected
    assert step(call, 8, 5, sequence_start=True).document["model_version"] == "2"


def test_what_a_sequence_does_not_take(call: Caller) -> None:
    step(call, 7, 3, sequence_start=True, seed=0)
    for sent, message in (
        (in_json(BATCH, parameters={"sequence_id": 7}), "expected no state"),
        (in_json({"x": BATCH["x"]}, parameters={"sequence_id": 7}), "one item"),
        (in_json(seen(1), parameters={"sequence_id": 7, "seed": 1}), "set when it starts"),
        (in_json(seen(1), parameters={"sequence_id": 7, "exploration": "random"}), "set when it starts"),
        (in_json(seen(1), outputs=[{"name": "digest"}], parameters={"sequence_id": 7}), "gives action, value"),
        (in_json(seen(1), parameters={"sequence_start": True}), "expected the sequence_id to start or end; got 0"),
        (in_json(seen(1), parameters={"sequence_id": "", "sequence_end": True}), "got ''"),
    ):
        status, text = error(call("POST", INFER, sent))
        assert status == 400
        assert message in text
    alone = Alone(1, 0, None)
    alone.take(seen(3))
    same(arrays(step(call, 7, 4, seed=0)), alone.take(seen(4)))
    assert step(call, 8, 4, sequence_start=True, exploration="wild").status == 400
    assert step(call, 8, 4).status == 404, "a start that failed left a sequence"


def test_a_seed_and_an_exploration_may_be_asked_for(call: Caller) -> None:
    def act(**parameters: Any) -> Answer:
        return call("POST", INFER, in_json({"x": BATCH["x"]}, parameters=parameters))

    modes: list[Exploration] = ["random", "deterministic"]
    seeded = [arrays(act(seed=4, exploration=mode)) for mode in (*modes, "random")]
    same(seeded[0], seeded[2])
    assert (seeded[0]["action"] != seeded[1]["action"]).any()
    assert act(seed=4, exploration="random").document["parameters"] == {"seed": 4}
    assert "parameters" not in act().document


def test_an_answer_that_comes_too_late_is_an_error_and_moves_nothing(call: Caller, registry: Versions) -> None:
    alone = Alone(1, 0, None)
    same(arrays(step(call, 7, 3, sequence_start=True, timeout=60_000_000, priority=3)), alone.take(seen(3)))
    runtime, open_ = registry.runtimes[1], threading.Event()
    run = runtime._run
    runtime._run = lambda arrays: run(arrays) if open_.wait(10) else []  # type: ignore[method-assign]
    for sequence in (7, 8):
        answer = step(call, sequence, 4, timeout=1000, sequence_start=sequence == 8)
        assert error(answer) == (503, "expected an answer within the timeout of 1,000 µs; it takes longer")
        assert answer.headers["retry-after"] == "1"
    open_.set()
    same(arrays(step(call, 7, 4)), alone.take(seen(4)))
    assert step(call, 8, 4).status == 404


def test_bodies_may_be_compressed_both_ways(call: Caller) -> None:
    batch = {name: np.repeat(array, 100, 0) for name, array in BATCH.items()}
    body, headers = in_binary(batch, parameters={"binary_data_output": True})
    expected = call("POST", INFER, body, headers)
    for coding, compress, expand in (
        ("gzip", gzip.compress, gzip.decompress),
        ("deflate", zlib.compress, zlib.decompress),
    ):
        asked = {**headers, "Content-Encoding": coding, "Accept-Encoding": f"br, {coding};q=0.5"}
        answer = call("POST", INFER, compress(body), asked)
        assert (answer.status, answer.headers["content-encoding"]) == (200, coding)
        assert len(answer.content) < len(expected.content)
        same(arrays(Answer(200, answer.headers, expand(answer.content))), arrays(expected))
        small = call("POST", INFER, compress(json.dumps(in_json(seen(3))).encode()), {**asked})
        assert small.status == 400, "the JSON ends where the header says"
        assert error(call("POST", INFER, compress(body)[:-1], asked))[0] == 400
        bomb = compress(bytes(MAX_BODY_BYTES + 1))
        assert error(call("POST", INFER, bomb, asked)) == (413, "a body may have at most 100,000 bytes; got more")
    small = call("POST", INFER, in_json(seen(3)), {"Accept-Encoding": "gzip, deflate"})
    assert "content-encoding" not in small.headers
    assert error(call("POST", INFER, body, {**headers, "Content-Encoding": "br"}))[0] == 400
    assert error(call("POST", INFER, bytes(MAX_BODY_BYTES + 1)))[0] == 413


def test_every_route_has_the_protocols_errors(call: Caller, registry: Versions) -> None:
    for method, path, status, message in (
        ("GET", "/v2/models/chess", 404, "no policy named 'chess'; known: digest"),
        ("GET", "/v2/models/digest/versions/2/ready", 404, "digest has no version"),
        ("POST", "/v2/models/chess/infer", 404, "no policy named 'chess'"),
        ("GET", "/v2/models/digest/infer", 405, "GET /v2/models/digest/infer: expected POST"),
        ("POST", "/v2/cudasharedmemory/region/r/register", 404, "the extensions offered are binary_tensor_data"),
        ("POST", "/v2/systemsharedmemory/region/r/register", 403, "expected a client of this host"),
        ("GET", "/v2/systemsharedmemory/region/r/status", 404, "no shared memory region 'r' is registered"),
        ("POST", "/v2/repository/models/digest/load", 404, "no such route"),
        ("GET", "/v2/health/ready", 503, "policies are being loaded"),
        ("POST", "/v2/repository/index", 400, '{"ready": true or false}'),
    ):
        found, text = error(call(method, path, {"ready": 7}))
        assert (found, message in text) == (status, True), text
    registry.runtimes[1].failing = True
    status, text = error(call("POST", INFER, in_json(BATCH)))
    assert status == 500
    assert "Traceback" not in text


def test_statistics_add_up(call: Caller) -> None:
    for _ in range(3):
        call("POST", INFER, in_json(BATCH))
    call("POST", INFER, in_json({}))
    ((found,),) = call("GET", f"/v2/models/{NAME}/versions/1/stats").document.values()
    assert (found["name"], found["version"], found["inference_count"], found["execution_count"]) == (NAME, "1", 6, 3)
    parts = found["inference_stats"]
    assert {name: part["count"] for name, part in parts.items()} == {
        "success": 3, "fail": 1, "queue": 3, "compute_input": 3, "compute_infer": 3, "compute_output": 3,
    }  # fmt: skip
    assert parts["success"]["ns"] == sum(
        parts[name]["ns"] for name in ("queue", "compute_input", "compute_infer", "compute_output")
    )
    assert all(part["ns"] > 0 for part in parts.values())
    assert found["last_inference"] > 1_700_000_000_000
