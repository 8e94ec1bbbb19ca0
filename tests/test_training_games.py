"""Games as they are played for training, and what a teacher sees of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from actserve_export.training import games as training_games
from actserve_export.training.atari import preprocessing
from actserve_export.training.games import QUIET_STEPS, Games, whole_games
from actserve_export.training.pong_view import PONG, SIZES
from actserve_export.training.ram_view import by_ram
from actserve_export.training.teacher import GamesEnv, Teacher, TeacherRecipe, see


def test_games_begin_from_any_seed() -> None:
    assert Games(PONG, 1, 14_000_000).now.any()  # a run resumed late: ALE's seeds have 31 bits


def test_movement_is_what_changed_between_two_screens() -> None:
    games = Games(PONG, 1, 0)
    view = PONG.view
    while any((view.see(screen, screen)[:, 0] == 84).any() for screen in (games.before, games.now)):
        games.step(torch.tensor([0]))  # until there is a ball
    moved, still = see(games), view.see(games.now, games.now)
    assert torch.equal(moved[:, :5], still[:, :5])
    assert not torch.equal(moved[:, 5:], still[:, 5:])
    assert (still[0, 5:7] - still.new_tensor([sum(SIZES) + 12, sum(SIZES) + 26 + 40])).tolist() == [0, 0]


def test_a_teacher_without_movement_acts_on_places_alone() -> None:
    bins = torch.arange(16).reshape(2, 8) + torch.tensor([0, 85, 213, 341, 469, 551, 577, 659])
    moved = torch.cat((bins[:, :5], bins[:, 5:] + 1), 1)
    for movement in (False, True):
        recipe = TeacherRecipe(movement=movement)
        teacher = Teacher(PONG, recipe)
        assert torch.equal(teacher.policy(bins), teacher.policy(moved)) is not movement
        assert not torch.equal(teacher.value(bins), teacher.value(moved))


def test_a_point_is_an_episode_and_the_game_goes_on() -> None:
    from torchrl.envs.utils import check_env_specs

    env = GamesEnv(Games(PONG, 2, 0))
    check_env_specs(env)
    rollout = env.rollout(200, break_when_any_done=False)
    scored = rollout["next", "reward"] != 0
    assert scored.any()
    assert torch.equal(rollout["next", "done"], scored)
    assert env.games.scores.sum() == rollout["next", "reward"].sum()  # no game is over yet


def test_a_life_is_an_episode_and_the_game_goes_on() -> None:
    from torchrl.envs.utils import check_env_specs

    env = GamesEnv(Games(by_ram("breakout"), 2, 0))
    check_env_specs(env)
    games = Games(by_ram("breakout"), 2, 0)
    ends, lost, lives = 0, 0, [5, 5]
    while len(games.finished) < 2:
        games.step(torch.tensor([1, 1]))  # FIRE
        left = [emulator.lives() for emulator in games.emulators]
        ends += int(games.ended.sum())
        lost += sum(now < before for now, before in zip(left, lives, strict=True)) + int(games.restarted.sum())
        lives = left
    assert ends == lost >= 10


def test_an_evaluation_ends_although_nobody_serves() -> None:
    steps = 0

    def wait(games: Games) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return torch.zeros(len(games), dtype=torch.int64)

    assert whole_games(by_ram("breakout"), 2, 0, wait) == [0, 0]
    assert steps == QUIET_STEPS


def test_a_game_in_which_something_happens_is_played_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_games, "QUIET_STEPS", 100)  # a life is shorter, a game longer
    played: list[Games] = []

    def serve(games: Games) -> torch.Tensor:
        played.append(games)
        return torch.full((len(games),), games.game.codes.index(1))

    scores = whole_games(by_ram("breakout"), 1, 0, serve)
    assert scores == played[-1].finished
    assert len(played) > 100


@pytest.mark.parametrize("game", ["pong", "boxing", "carnival"])  # screens of two sizes
def test_a_student_learns_on_what_the_policy_will_see(game: str) -> None:
    games = Games(by_ram(game), 2, 0)
    for _ in range(60):
        games.step(torch.randint(len(games.game.codes), (2,)))
    screens = torch.from_numpy(np.stack([emulator.getScreenRGB() for emulator in games.emulators]))
    seen = preprocessing()(TensorDict({"pixels": screens}, [2]))["pixels"]
    assert (torch.from_numpy(games.greys()) - seen[:, 0] * 255).abs().max() <= 0.51


def test_a_teacher_of_any_game_sees_every_byte_and_what_changed() -> None:
    now = np.random.default_rng(0).integers(0, 256, (2, 128), np.uint8)
    view, one = by_ram("boxing").view, np.ones(128, np.uint8)
    for movement in (False, True):
        network = view.network(3, movement)
        first = network(view.see(now, now))
        assert torch.equal(first, network(view.see(now, now ^ one))) is not movement
        for byte in np.eye(128, dtype=np.uint8):
            assert not torch.equal(first, network(view.see(now ^ byte, now)))
