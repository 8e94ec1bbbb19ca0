"""Whole games through the real service."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from app.client import local
from app.client.local import LocalService
from app.client.ways import WAYS
from app.store import ModelStore


def play(service: LocalService, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "app", "play", "--url", service.url, "--json", *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_a_seeded_game_is_the_same_twice_and_with_either_runtime(both: dict[str, LocalService]) -> None:
    first, again, other = (
        play(both["onnx"], "--seed", "3"),
        play(both["onnx"], "--seed", "3"),
        play(both["pt2"], "--seed", "3"),
    )
    assert first["episodes"] == again["episodes"] == other["episodes"]
    assert (first["runtime"], other["runtime"]) == ("onnx", "pt2")
    assert first["policy"] == "pong"
    assert set(first["latency_ms"]) == {"p50", "p90", "p99", "p999"}
    (episode,) = first["episodes"]
    assert episode["seed"] == 3
    assert abs(episode["score"]) <= 21
    assert episode["steps"] > 500


def test_a_recurrent_policy_plays_the_same_game_by_every_way_on_both_runtimes(lstm_store: ModelStore) -> None:
    games = {}
    for runtime in ("onnx", "pt2"):
        with local.serve(lstm_store.root, "--runtime", runtime) as service:
            for way in WAYS:
                report = play(service, "--seed", "3", "--via", way)
                assert (report["policy"], report["runtime"]) == ("pong-lstm", runtime)
                games[runtime, way] = report["episodes"]
    assert len(games) == 8
    first, *others = games.values()
    assert first[0]["steps"] > 500
    assert others == [first] * 7
