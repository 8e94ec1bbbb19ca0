"""The benchmark in gym-pusht, with a policy that is hardly trained and short episodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from actserve.cli.tools import local_service as local
from actserve_export.publish import export
from tests.benchmarks.pusht import expert, play
from tests.benchmarks.pusht.__main__ import HEADER, Interval, interval, lines, summary
from tests.benchmarks.pusht.distil import School, distilled, fit, source
from tests.benchmarks.pusht.play import Played
from tests.benchmarks.pusht.policy import HORIZON, LATE, Planner
from tests.benchmarks.realtime import DELAY_S, SPREAD_S, delayed

GAMES, STEPS_OF_TRAINING = 4, 60
STEPS = 24  # control periods of an episode


def test_the_expert_reaches_its_goal() -> None:
    played = [play.by_the_expert(seed) for seed in range(4)]
    assert all(found.solved for found in played)
    assert min(found.score for found in played) > 95
    assert max(play.standing_still(seed).score for seed in range(4)) < 50


def test_lessons_are_what_the_expert_does() -> None:
    lessons = School(0, GAMES).lessons(1)
    now = lessons[lessons.delays == 0]
    targets, contacts = expert.act(now.observations[:, -1].double().numpy())  # in mirrored scenes, too
    np.testing.assert_allclose(targets, now.plans[:, 0].numpy(), atol=1e-2)
    assert contacts.tolist() == now.contacts.tolist()
    for delay in range(1, LATE + 1):
        later = lessons[lessons.delays == delay]
        assert torch.equal(later.left_over[:, :delay], later.plans[:, :delay])


def test_a_learner_comes_nearer_to_the_expert() -> None:
    school, learner = School(0, GAMES), Planner()
    lessons = school.lessons(1)
    before = learner.loss(*lessons.all).item()
    assert fit(learner, lessons, STEPS_OF_TRAINING) < before / 2
    own = school.lessons(1, learner.eval())
    assert own.plans.shape == (len(lessons.contacts), HORIZON, 2)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a service with a policy that has learnt little."""
    folder: Path = tmp_path_factory.mktemp("store")
    learner, lessons = distilled(print, games=GAMES, rounds=1, turns=1, steps=STEPS_OF_TRAINING)
    export(source(learner, lessons), "pusht", folder, runtimes=["onnx"])
    with local.serve(folder, "--runtime", "onnx") as service:
        yield service.url


def test_without_latency_the_simulation_waits_for_each_chunk(url: str) -> None:
    first, again = (play.without_latency(url, 3, STEPS) for _ in range(2))
    assert first == again
    assert (first.steps, first.held, first.late) == (STEPS, 0, 0)


def test_in_real_time_actions_are_held_while_an_answer_is_awaited(url: str) -> None:
    with delayed(url) as slow:
        found, waiting = play.in_real_time(slow, 3, STEPS), play.asking_and_waiting(slow, 3, STEPS)
    for played in (found, waiting):
        assert played.steps == STEPS
        assert min(played.answer_ms) > 1000 * (DELAY_S - SPREAD_S) - 1
    assert len(waiting.answer_ms) + waiting.held == STEPS
    assert waiting.held >= STEPS / 2  # an answer takes more than one period


def test_differences_are_paired() -> None:
    reference = [Played(seed, score=score, steps=10) for seed, score in enumerate((10.0, 50.0, 90.0))]
    lower = [Played(played.seed, score=played.score - 2, steps=10, held=5) for played in reference]
    found = summary(lower, reference)
    assert found.difference == Interval(-2, 0)
    assert found.score.mean == 48
    assert found.held == 0.5
    assert interval([0.0, 2.0]).margin == pytest.approx(1.96, abs=0.001)
    assert all(len(line) == len(HEADER) for line in lines({"lower": found}))
