"""A teacher, and a student that learns from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensordict import TensorDict

from actserve.core.errors import UsageError
from actserve_export.training import bundled, distill
from actserve_export.training.atari import environment, value_network
from actserve_export.training.bundled import WEIGHTS
from actserve_export.training.games import Games, whole_games
from actserve_export.training.pong_lstm import Head, copy_feed_forward_weights, recurrent_network
from actserve_export.training.pong_view import PONG, SIZES
from actserve_export.training.ram_view import by_ram
from actserve_export.training.recurrent import RecurrentRecipe, RecurrentStudent
from actserve_export.training.run import Run
from actserve_export.training.student import Student, StudentRecipe, centre, centred, uncentre
from actserve_export.training.teacher import CONTINUED, Teacher, TeacherRecipe, see
from actserve_export.training.train import train as train_by_name


def test_the_teacher_and_the_student_learn_in_turn_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = TeacherRecipe(total_steps=256, games=2, steps_per_round=64, batch_size=32)
    student = StudentRecipe(
        total_steps=128, games=2, batch_size=8, buffer_size=256, warm_up=32, evaluate_every=10**6, evaluation_games=1
    )
    distill.train(Run(tmp_path, None, resume=True), 0, teacher=teacher, student=student)
    first = load_file(tmp_path / "training.safetensors")
    assert (int(first["teacher.steps"]), int(first["student.steps"])) == (256, 128)
    value_network(6).load_state_dict(load_file(tmp_path / "best.safetensors"))
    monkeypatch.setattr(Student, "evaluate", lambda *_: [-21.0])  # whole games take most of the time
    distill.train(Run(tmp_path, None, resume=True), 0, teacher=teacher, student=replace(student, total_steps=256))
    second = load_file(tmp_path / "training.safetensors")
    assert int(second["student.steps"]) == 256
    assert torch.equal(first["teacher.policy.0.table.weight"], second["teacher.policy.0.table.weight"])
    assert not torch.equal(first["student.network.0.0.weight"], second["student.network.0.0.weight"])


def test_a_teacher_learns_what_a_policy_does() -> None:
    torch.manual_seed(0)
    recipe = TeacherRecipe(games=4, imitation_steps=4_000)
    teacher, games = Teacher(PONG, recipe), Games(PONG, 4, 0)

    def values(games: Games) -> TensorDict:
        """RIGHT while the ball is in the upper half, else LEFT, and NOOP without a ball."""
        ball = see(games)[:, 1] - SIZES[0]
        sure = torch.tensor([[0.0, 4, 0], [0, 0, 4], [4, 0, 0]])
        return TensorDict({"values": sure[torch.where(ball == 127, 2, (ball > 64).long())]}, [4])

    def difference() -> float:
        found = [(teacher.probabilities(games) - values(games)["values"].softmax(-1)).abs().mean()]
        for _ in range(100):
            games.step(teacher.probabilities(games).argmax(-1))
            found.append((teacher.probabilities(games) - values(games)["values"].softmax(-1)).abs().mean())
        return float(torch.stack(found).mean())

    before = difference()
    teacher.imitate(games, values, lambda *_: None)
    assert teacher.imitated == 4_000
    assert before > 0.3
    assert difference() < 0.1


def test_the_bundled_weights_are_improved_from_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Student, Teacher):
        monkeypatch.setattr(kind, "evaluate", lambda *_: [-21.0])  # whole games take most of the time
    teacher = replace(CONTINUED, total_steps=256, games=2, steps_per_round=64, batch_size=32, imitation_steps=32)
    student = StudentRecipe(total_steps=64, games=2, batch_size=8, buffer_size=256, warm_up=1_000, evaluate_every=64)
    distill.improve(Run(tmp_path / "pong", None, resume=True), 0, teacher=teacher, student=student)
    kept = load_file(tmp_path / "pong" / "best.safetensors")
    for name, weights in load_file(WEIGHTS["pong"]).items():  # it has not begun to learn
        torch.testing.assert_close(kept[name], weights, atol=1e-5, rtol=1e-5)
    tensors = load_file(tmp_path / "pong" / "training.safetensors")
    assert (int(tensors["teacher.imitated"]), int(tensors["teacher.steps"])) == (32, 256)
    assert not torch.equal(tensors["teacher.policy.0.table.weight"], tensors["teacher.average.module.0.table.weight"])
    recurrent = RecurrentRecipe(total_steps=48, games=2, batch_size=2, buffer_size=8, warm_up=1_000, evaluate_every=48)
    movement = replace(teacher, movement=True)
    distill.improve_recurrent(Run(tmp_path / "lstm", None, resume=True), 0, movement, recurrent)
    kept = load_file(tmp_path / "lstm" / "best.safetensors")
    for name, weights in load_file(WEIGHTS["pong-lstm"]).items():
        torch.testing.assert_close(kept[name], weights, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_of_an_older_recipe_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, None, resume=True)
    run.save({}, {"teacher.steps": torch.tensor(0), "student.steps": torch.tensor(0)})
    with pytest.raises(UsageError, match="of an older recipe: start again with --no-resume"):
        distill.train(Run(tmp_path, None, resume=True), 0)


def test_only_the_critic_learns_at_first() -> None:
    torch.manual_seed(0)
    recipe = TeacherRecipe(total_steps=256, games=2, steps_per_round=64, batch_size=32, critic_share=0.5)
    teacher = Teacher(PONG, recipe)
    changed = []
    before = [weights.clone() for weights in (teacher.policy[-1].weight, teacher.value[-1].weight)]

    def compare(_: float) -> None:
        now = [teacher.policy[-1].weight, teacher.value[-1].weight]
        changed.append([not torch.equal(*pair) for pair in zip(before, now, strict=True)])

    teacher.train(Games(PONG, 2, 0), compare)
    assert changed == [[False, True], [True, True]]


def test_the_steps_that_are_wanted_are_shared_by_the_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Student, Teacher):
        monkeypatch.setattr(kind, "evaluate", lambda *_: [-21.0])
    student = StudentRecipe(total_steps=3_000, games=2, warm_up=10_000, batch_size=8)
    teacher = TeacherRecipe(total_steps=6_000, games=2, steps_per_round=32, batch_size=32, imitation_steps=1_000)
    distill.improve(Run(tmp_path, 1_000, resume=True), 0, teacher=teacher, student=student)
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    steps = (recipe["teacher"]["imitation_steps"], recipe["teacher"]["total_steps"], recipe["student"]["total_steps"])
    assert steps == (100, 600, 300)
    assert recipe["method"] == "improve"


def test_a_student_with_memory_learns_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Student, "evaluate", lambda *_: [-21.0])  # whole games take most of the time
    teacher = TeacherRecipe(total_steps=128, games=2, steps_per_round=64, batch_size=32, movement=True)
    student = RecurrentRecipe(
        total_steps=96, games=2, batch_size=2, buffer_size=8, warm_up=32, evaluate_every=10**6, evaluation_games=1
    )
    distill.train_recurrent(Run(tmp_path, None, resume=True), 0, teacher, student)
    first = load_file(tmp_path / "training.safetensors")
    recurrent_network().load_state_dict(load_file(tmp_path / "best.safetensors"))
    distill.train_recurrent(Run(tmp_path, None, resume=True), 0, teacher, replace(student, total_steps=192))
    second = load_file(tmp_path / "training.safetensors")
    assert int(second["student.steps"]) == 192
    lstm = "student.network.module.1.lstm.weight_hh_l0"
    assert not torch.equal(first[lstm], second[lstm])
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["student"]["total_steps"] == 192
    assert recipe["versions"]["torchrl"]


def test_a_student_with_memory_starts_as_the_one_without() -> None:
    weights = load_file(WEIGHTS["pong"])
    network = recurrent_network()
    with torch.no_grad():
        copy_feed_forward_weights(network, weights)
    feed_forward = value_network(6)
    feed_forward.load_state_dict(weights)
    pixels = torch.rand(3, 1, 84, 84)
    state = torch.randn(3, 1, 256)
    step = TensorDict(
        {"pixels": pixels, "recurrent_state_h": state, "recurrent_state_c": state, "is_init": torch.zeros(3, 1) > 0},
        [3],
    )
    torch.testing.assert_close(network(step)["action_value"], feed_forward(pixels))


def test_a_window_is_learned_from_as_it_was_played() -> None:
    """Stepping with the state carried, with a game that begins in between, gives what the whole window gives."""
    torch.manual_seed(0)
    recipe = RecurrentRecipe(games=2, steps_per_round=8, burn_in=2)
    student = RecurrentStudent(PONG, recipe, 0)
    torch.nn.init.normal_(next(m for m in student.network.modules() if isinstance(m, Head)).linear.weight, std=0.05)
    games = Games(PONG, 2, 0)
    values = student.playing(student.network)
    steps = []
    for number in range(8):
        games.restarted[:] = number in (0, 5)
        step = values(games)
        steps.append(step.set("target", step["values"].softmax(-1)))
        games.step(torch.tensor([1, 2]))
    window = student.arrange(TensorDict.stack(steps, 1))
    with torch.autocast("cpu", enabled=False):
        logits, _ = student.logits(window)
    stepped = torch.stack([step["values"] for step in steps], 1)
    torch.testing.assert_close(logits[..., student.chosen], stepped[:, 2:], atol=0.05, rtol=0.05)  # bfloat16


def test_any_game_is_trained_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Student, Teacher):
        monkeypatch.setattr(kind, "evaluate", lambda *_: [0.0])  # whole games take most of the time
    recipe = TeacherRecipe(total_steps=1_000, games=2, steps_per_round=64, batch_size=32)
    monkeypatch.setattr(distill, "ANY_GAME", recipe)
    checkpoint = train_by_name("space-invaders", out=tmp_path, total_frames=2_000, seed=0)
    written = json.loads((tmp_path / "recipe.json").read_text())
    assert (written["game"], written["method"]) == ("space_invaders", "distill")
    network = value_network(len(environment("space_invaders").actions))
    network.load_state_dict(load_file(checkpoint))
    tensors = load_file(tmp_path / "training.safetensors")
    assert int(tensors["teacher.steps"]) > 0
    assert int(tensors["student.steps"]) > 0


def test_boxing_plays_well() -> None:
    weights = bundled.policy("boxing").weights
    assert weights is not None

    def greedy(games: Games) -> torch.Tensor:
        with torch.no_grad():
            chosen: torch.Tensor = weights(torch.from_numpy(games.greys())[:, None] / 255).argmax(-1)
        return chosen

    assert np.mean(whole_games(by_ram("boxing"), 3, 0, greedy)) >= 15  # at random: 0.1


def test_centring_is_folded_into_the_first_convolution_exactly() -> None:
    torch.manual_seed(0)
    student = Student(PONG, StudentRecipe(), 0)
    screens = torch.randint(0, 256, (4, 84, 84), dtype=torch.uint8)
    network = value_network(6)
    network.load_state_dict(student.weights())
    torch.testing.assert_close(
        network(screens.float()[:, None] / 255), student.network(centred(screens)), atol=1e-5, rtol=1e-5
    )
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    centre(network)
    uncentre(network)
    torch.testing.assert_close(network.state_dict(), before)
