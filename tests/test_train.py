from __future__ import annotations

import csv
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
from actserve_export.training.atari import environment, preprocessing, value_network
from actserve_export.training.bundled import WEIGHTS
from actserve_export.training.dqn import Recipe, _pack, train
from actserve_export.training.games import Games, whole_games
from actserve_export.training.pong_lstm import Head, copy_feed_forward_weights, recurrent_network
from actserve_export.training.pong_view import PONG, SIZES
from actserve_export.training.ram_view import by_ram
from actserve_export.training.recurrent import RecurrentRecipe, RecurrentStudent
from actserve_export.training.run import Run, draw, optimizer_tensors, restore_optimizer
from actserve_export.training.student import Student, StudentRecipe, centre, centred, uncentre
from actserve_export.training.teacher import CONTINUED, GamesEnv, Teacher, TeacherRecipe, see
from actserve_export.training.train import train as train_by_name

PNG = b"\x89PNG\r\n\x1a\n"
TINY = Recipe(
    total_frames=256, frames_per_batch=64, updates_per_batch=2, batch_size=8, buffer_size=512, warm_up=128,
    epsilon_steps=256,
)  # fmt: skip


def counters(folder: Path) -> dict[str, float]:
    run = Run(folder, None, resume=True)
    run.restore()
    return run.counters


def history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 256 steps that did learn. To be looked at, not changed."""
    folder = tmp_path_factory.mktemp("run")
    train(Run(folder, None, resume=True), seed=0, recipe=TINY)
    return folder


def test_a_run_leaves_weights_that_the_policy_takes(trained: Path) -> None:
    weights = load_file(trained / "checkpoint.safetensors")
    source = bundled.policy("pong")
    assert source.weights is not None
    source.weights.load_state_dict(weights)
    torch.manual_seed(0)
    untrained = value_network(6).state_dict()
    assert any(not torch.equal(untrained[name], tensor) for name, tensor in weights.items())


def test_a_run_counts_what_it_did(trained: Path) -> None:
    assert counters(trained)["frames"] == 256
    last = history(trained)[-1]
    assert float(last["frames"]) == 256
    assert float(last["loss"]) > 0
    assert float(last["epsilon"]) == pytest.approx(TINY.epsilon_end)
    assert float(last["seconds"]) > 0


def test_the_target_network_follows(trained: Path) -> None:
    tensors = load_file(trained / "training.safetensors")
    online = [name for name in tensors if name.startswith("network.")]
    targets = [name for name in tensors if name.startswith("target.")]
    assert len(online) == len(targets) == 10
    by_shape = {tuple(tensors[name].shape): tensors[name] for name in targets}
    for name in online:
        gap = (tensors[name] - by_shape[tuple(tensors[name].shape)]).abs().max()
        assert 0 < gap < 0.1


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    train(Run(tmp_path, 128, resume=True), seed=0, recipe=TINY)
    before = load_file(tmp_path / "training.safetensors")
    assert counters(tmp_path)["frames"] == 128
    train(Run(tmp_path, 320, resume=True), seed=0, recipe=TINY)
    after = load_file(tmp_path / "training.safetensors")
    assert counters(tmp_path)["frames"] == 320
    steps = next(name for name in after if name.startswith("optimizer.") and name.endswith(".step"))
    assert after[steps] > before[steps] > 0  # the optimiser went on too, and did not start again
    assert [float(row["frames"]) for row in history(tmp_path)] == [128, 320]


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    train(Run(tmp_path, 64, resume=True), seed=0, recipe=TINY)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    train(Run(tmp_path, 64, resume=True), seed=1, recipe=TINY)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_a_run_can_start_anew(tmp_path: Path) -> None:
    train(Run(tmp_path, 128, resume=True), seed=0, recipe=TINY)
    train(Run(tmp_path, 64, resume=False), seed=0, recipe=TINY)
    assert counters(tmp_path)["frames"] == 64
    assert [float(row["frames"]) for row in history(tmp_path)] == [64]


def test_run_trains_by_name_and_draws_the_curve(tmp_path: Path) -> None:
    checkpoint = train_by_name("pong", out=tmp_path / "new" / "pong", total_frames=64, seed=0, method="dqn")
    assert checkpoint == tmp_path / "new" / "pong" / "checkpoint.safetensors"
    assert load_file(checkpoint)
    assert (checkpoint.parent / "curve.png").read_bytes().startswith(PNG)
    assert not list(checkpoint.parent.glob("*.part"))


def test_an_unknown_name_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected pong, pong-lstm, boxing, a game of ale-py .*; got 'checkers'"):
        train_by_name("checkers", out=tmp_path, total_frames=1, seed=0)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    training = Run(tmp_path, None, resume=True)
    training.save({"w": torch.zeros(1)}, {"t": torch.zeros(1)})
    with pytest.raises(ValueError, match="contiguous"):
        training.save({"w": torch.zeros(2, 3).t()}, {"t": torch.ones(1)})
    assert load_file(tmp_path / "checkpoint.safetensors")["w"].tolist() == [0]
    assert load_file(tmp_path / "training.safetensors")["t"].tolist() == [0]


def test_an_optimizer_survives_being_tensors() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    first = torch.optim.Adam([weight], lr=0.1)
    weight.square().sum().backward()
    first.step()
    second = torch.optim.Adam([weight], lr=0.1)
    restore_optimizer(second, optimizer_tensors(first))
    assert second.state_dict()["state"][0]["step"] == 1
    assert torch.equal(second.state_dict()["state"][0]["exp_avg"], first.state_dict()["state"][0]["exp_avg"])


def test_a_curve_of_one_point_can_be_drawn(tmp_path: Path) -> None:
    (tmp_path / "history.csv").write_text("frames,mean_return,stage\n64,-21,\n")
    draw(tmp_path / "history.csv", tmp_path / "curve.png", title="pong")
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)


def test_a_fresh_start_that_is_stopped_leaves_nothing_of_the_old_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(Run(tmp_path, 128, resume=True), seed=0, recipe=TINY)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Run, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train(Run(tmp_path, 64, resume=False), seed=0, recipe=TINY)
    assert Run(tmp_path, None, resume=True).restore() == {}


def test_steps_after_the_checkpoint_are_not_in_the_history_twice(tmp_path: Path) -> None:
    train(Run(tmp_path, 128, resume=True), seed=0, recipe=TINY)
    with (tmp_path / "history.csv").open("a") as file:
        file.write("192,0,1.0,-21.0,0.0,1.0,\n")  # recorded, and then the machine went down
    train(Run(tmp_path, 256, resume=True), seed=0, recipe=TINY)
    assert [float(row["frames"]) for row in history(tmp_path)] == [128, 256]


def test_a_finished_run_without_a_history_is_no_error(tmp_path: Path) -> None:
    train_by_name("pong", out=tmp_path, total_frames=64, seed=0, method="dqn")
    (tmp_path / "history.csv").unlink()
    assert train_by_name("pong", out=tmp_path, total_frames=64, seed=0, method="dqn").exists()


def test_checkpoints_can_be_read_by_others(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    Run(tmp_path, None, resume=True).save({"w": torch.zeros(1)}, {"t": torch.zeros(1)})
    assert (tmp_path / "checkpoint.safetensors").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_observed_screens_are_distinct_and_the_same_every_time() -> None:
    source = bundled.policy("pong")
    assert source.observe is not None
    screens = source.observe(64)["pixels"]
    assert screens.shape == (64, 210, 160, 3)
    assert len({screen.numpy().tobytes() for screen in screens}) == 64
    assert torch.equal(screens, source.observe(64)["pixels"])


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


def test_rewards_are_learned_from_as_their_sign() -> None:
    pixels = torch.rand(3, 1, 84, 84)
    steps = TensorDict(
        {"pixels": pixels, "next": {"pixels": pixels, "reward": torch.tensor([[-7.0], [0], [400]])}}, [3]
    )
    assert _pack(steps)["next", "reward"].flatten().tolist() == [-1, 0, 1]


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


@pytest.mark.parametrize("game", ["pong", "boxing", "carnival"])  # screens of two sizes
def test_a_student_learns_on_what_the_policy_will_see(game: str) -> None:
    games = Games(by_ram(game), 2, 0)
    for _ in range(60):
        games.step(torch.randint(len(games.codes), (2,)))
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


def test_a_game_for_two_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="for two players"):
        train_by_name("joust", out=tmp_path, total_frames=1, seed=0)


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


def test_an_unknown_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pong can be trained by distill, dqn, improve; got 'magic'"):
        train_by_name("pong", out=tmp_path, total_frames=1, seed=0, method="magic")
