from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensordict import TensorDict

from actserve.core.errors import UsageError
from actserve_export.training import bundled
from actserve_export.training.atari import value_network
from actserve_export.training.dqn import Recipe, _pack, train
from actserve_export.training.run import Run, draw, optimizer_tensors, restore_optimizer
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


def test_the_best_weights_are_those_to_export(tmp_path: Path) -> None:
    run = Run(tmp_path, None, resume=True)
    run.save({"w": torch.zeros(1)}, {})
    assert run.weights == tmp_path / "checkpoint.safetensors"
    run.keep_best({"w": torch.ones(1)})
    assert load_file(run.weights)["w"].tolist() == [1]


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
    Run(tmp_path, None, resume=True).keep_best({"w": torch.zeros(1)})

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Run, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train(Run(tmp_path, 64, resume=False), seed=0, recipe=TINY)
    assert Run(tmp_path, None, resume=True).restore() == {}
    assert list(tmp_path.glob("*.safetensors")) == []


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


def test_rewards_are_learned_from_as_their_sign() -> None:
    pixels = torch.rand(3, 1, 84, 84)
    steps = TensorDict(
        {"pixels": pixels, "next": {"pixels": pixels, "reward": torch.tensor([[-7.0], [0], [400]])}}, [3]
    )
    assert _pack(steps)["next", "reward"].flatten().tolist() == [-1, 0, 1]


def test_a_game_for_two_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="for two players"):
        train_by_name("joust", out=tmp_path, total_frames=1, seed=0)


def test_an_unknown_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pong can be trained by distill, dqn, improve; got 'magic'"):
        train_by_name("pong", out=tmp_path, total_frames=1, seed=0, method="magic")
