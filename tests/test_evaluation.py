from __future__ import annotations

import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from ale_py import roms
from rich.console import Console

from actserve.atari.evaluation import PROTOCOLS, compare, print_comparison, print_summary, summarise
from actserve.atari.human_scores import SCORES, normalised
from actserve.atari.play import EpisodeResult, Report
from actserve.core.errors import UsageError
from tests.test_atari import PONG


def report(scores: list[float], runtime: str = "onnx", seed: int = 0, actions: str = "a") -> Report:
    episodes = tuple(EpisodeResult(seed + i, score, 100, f"{actions}{i}") for i, score in enumerate(scores))
    return Report("pong", runtime, "pong", episodes, {}, 1.0)


def test_the_figures_of_eight_games() -> None:
    found = summarise([21, 19, 20, 18, -3, 21, 15, 17], "pong")
    assert (found.games, found.lowest, found.highest, found.lost) == (8, -3, 21, 1)
    assert found.mean == pytest.approx(16)
    assert found.median == pytest.approx(18.5)
    assert found.iqm == pytest.approx((17 + 18 + 19 + 20) / 4)
    assert found.human_normalised == pytest.approx((16 + 20.7) / (14.6 + 20.7))
    assert found.mean_interval is not None
    assert found.iqm_interval is not None
    assert -3 < found.mean_interval[0] < 16 < found.mean_interval[1] < 21
    assert found.mean_interval[0] < found.iqm_interval[0] < 18.5 < found.iqm_interval[1] <= 21
    assert json.loads(json.dumps(found.as_json()))["iqm"] == pytest.approx(18.5)


def test_the_interval_is_the_bootstraps() -> None:
    rng = np.random.default_rng(3)
    scores = rng.normal(10, 2, 40)
    found = summarise(scores.tolist(), "pong")
    means = rng.choice(scores, (20_000, 40)).mean(1)
    assert found.mean_interval == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.05)
    assert summarise(scores.tolist(), "pong") == found


def test_one_game_has_no_interval_and_equal_games_one_without_width() -> None:
    assert summarise([5.0], "pong").mean_interval is None
    same = summarise([5.0] * 4, "pong")
    assert same.mean_interval == same.iqm_interval == (5.0, 5.0)


def test_two_reports_are_compared_game_by_game() -> None:
    first, second = report([20, 18, 21]), report([18, 18, 21], "pt2")
    second = replace(second, episodes=(replace(second.episodes[0], actions_sha256="other"), *second.episodes[1:]))
    found = compare(first, second)
    assert (found.better, found.equal, found.worse, found.same_actions) == (1, 2, 0, 2)
    assert found.difference == pytest.approx(2 / 3)
    assert found.difference_interval is not None
    assert found.difference_interval == pytest.approx((0.0, 2.0))
    assert (found.first, found.second) == ("pong on .onnx", "pong on .pt2")


@pytest.mark.parametrize(
    "other", [report([1.0, 2.0], seed=1), report([1.0]), replace(report([1.0, 2.0]), game="boxing")]
)
def test_other_games_cannot_be_compared(other: Report) -> None:
    with pytest.raises(UsageError, match="the same game with the same seeds; got pong"):
        compare(report([1.0, 2.0]), other)


def test_the_protocol_is_what_the_environment_was_trained_with() -> None:
    PROTOCOLS["machado"](PONG)
    with pytest.raises(UsageError, match=r"repeat_action_probability 0\.25; .* trained with .*probability 0\.0$"):
        PROTOCOLS["machado"](replace(PONG, repeat_action_probability=0.0))
    with pytest.raises(UsageError, match=r"max_frames 108000; .*max_frames 27000$"):
        PROTOCOLS["machado"](replace(PONG, max_frames=27_000))


def test_human_scores_are_of_games_that_ale_has() -> None:
    assert len(SCORES) == 57
    assert set(SCORES) <= set(roms.get_all_rom_ids())
    assert all(random < human for random, human in SCORES.values())
    assert normalised("breakout", 30.5) == 1
    assert normalised("pong", -20.7) == 0
    assert normalised("donkey_kong", 5) is None


def test_what_is_printed() -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    print_summary(summarise([21, 19], "pong"), console)
    print_summary(summarise([5], "donkey_kong"), console)
    print_comparison(compare(report([20, 18]), report([18, 18])), console)
    text = console.export_text()
    assert "2 games: mean +20.00 (+19.00 to +21.00), median +20.0" in text
    assert "human-normalised 1.15" in text
    assert "1 games: mean +5.00, median" in text
    assert "+1.00 (+0.00 to +2.00)" in text


def test_without_scipy_the_command_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(UsageError, match=r"pip install \"actserve\[evaluate\]\""):
        summarise([1.0, 2.0], "pong")
