"""The recorder and its writer: the budget, the buffer, full disks, and processes that are killed."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from actserve.core.errors import CorruptRecording, UsageError
from actserve.core.settings import Settings
from actserve.core.signature import IS_INIT, Arrays, Signature, State, TensorSpec
from actserve.engine.batcher import Batcher
from actserve.engine.recorders import Feedback, StepRecorder
from actserve.recording import writer as writers
from actserve.recording.budget import CAPACITY_S, REFILL_S, RESERVE, Budget
from actserve.recording.reader import Recording
from actserve.recording.recorder import KEPT_VERSIONS, RecordedPolicy, Recorder
from actserve.recording.shards import Columns, Header, ShardWriter, arrays_of, schema, tensor_columns
from actserve.recording.writer import SHARD_S, TEMPORARY, Writer, prepare
from actserve.server.app import recorder_for
from actserve.store.artifact import Artifact, Manifest
from tests.clock import Clock
from tests.recorded import Unlimited, steps_in
from tests.waiting import until

SIGNATURE = Signature(
    observations=(TensorSpec("screen", "uint8", (40, 50)), TensorSpec("speed", "float32", ())),
    outputs=(TensorSpec("action", "int64", ()), TensorSpec("value", "float32", (3,))),
    max_batch=8,
    state=(State(TensorSpec("memory", "float32", (4,)), "next_memory"),),
    is_init=True,
)
NAME = "robot"


def artifact(version: int = 1, signature: Signature = SIGNATURE) -> Artifact:
    return Artifact(Path("nowhere"), Manifest(1, NAME, version, None, "", signature, None, {}, {}, {}, {}))


def batch(step: int, size: int = 1, is_init: bool = False) -> tuple[Arrays, Arrays]:
    """(inputs, outputs) of a program. Every step has other values."""
    rng = np.random.default_rng(step)
    inputs = {spec.name: spec.sample(rng, size) for spec in SIGNATURE.inputs}
    inputs[IS_INIT.name] = np.full(size, is_init)
    return inputs, {spec.name: spec.sample(rng, size) for spec in SIGNATURE.results}


def take(episode: Any, number: int, is_init: bool | None = None) -> None:
    step = episode.step(number)
    step.capture(*batch(number, is_init=number == 1 if is_init is None else is_init), slice(0, 1), 1000)
    step.commit()


def recorder_of(buffer_bytes: int = 64 << 20, budget: Budget | None = None) -> tuple[Recorder, RecordedPolicy]:
    recorder = Recorder("a folder", budget or Unlimited(1.0), buffer_bytes)
    return recorder, recorder.of(artifact(), "onnx")


# the budget


class Nanoseconds:
    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


def test_a_budget_is_spent_and_fills_again() -> None:
    clock = Nanoseconds()
    budget = Budget(0.02, clock)
    assert budget.has_room()
    budget.writing_ns += int(0.02 * CAPACITY_S * 1e9)
    assert not budget.has_room()
    clock.now_ns = int(REFILL_S * 1e9) - 1
    assert not budget.has_room()
    clock.now_ns += 2
    assert budget.has_room()


def test_a_budget_leaves_some_to_episodes() -> None:
    budget = Budget(0.02, lambda: 0)
    budget.copying_ns += int((1 - RESERVE) * 0.02 * CAPACITY_S * 1e9)
    assert not budget.has_room(reserve=True)
    assert budget.has_room()
    assert not budget.has_room(reserve=True)


def test_rows_that_wait_are_counted_at_the_cost_of_the_last_ones() -> None:
    clock = Nanoseconds()
    budget = Budget(0.02, clock)
    budget.writing_ns, budget.written_bytes = 1_000_000, 1000  # 1 ms a kilobyte
    budget.copied_bytes = 1000 + 199_000  # 199 ms of 200 ms
    assert not budget.has_room()
    budget.copied_bytes = 1000
    clock.now_ns = 10**9
    assert budget.has_room()


def test_a_robot_at_50_hz_is_within_the_default() -> None:
    """At a third of a millisecond a step, which is several times what a screen takes."""
    clock = Nanoseconds()
    budget = Budget(Settings().record_cpu, clock)
    for _ in range(50 * 600):
        clock.now_ns += 20_000_000
        budget.writing_ns += 333_000
        assert budget.has_room()


# the recorder


def test_requests_that_are_not_chosen_are_counted() -> None:
    recorder, policy = recorder_of(budget=Budget(0.02, Nanoseconds()))
    recorder.budget.writing_ns = 10**9
    assert [policy.request(None) for _ in range(3)] == [None] * 3
    assert policy.recorded.counts() == {"budget": 3}


def test_an_episode_that_is_not_chosen_is_counted_and_the_next_may_be() -> None:
    clock = Nanoseconds()
    recorder, policy = recorder_of(budget=Budget(0.02, clock))
    recorder.budget.writing_ns = 10**9
    episode = policy.episode("stream", None)
    assert episode is not None
    for number in (1, 2, 3):
        take(episode, number)
    assert policy.recorded.outcomes == {"budget": 3}
    clock.now_ns += 100 * 10**9
    take(episode, 4)  # the same episode: still not
    take(episode, 5, is_init=True)
    take(episode, 6)
    assert policy.recorded.outcomes == {"budget": 4, "recorded": 2}
    assert [rows.episodes for _, rows in recorder.rows] == [[f"{episode.first_id}.5"]] * 2


def test_an_episode_ends_where_a_step_is_dropped() -> None:
    recorder, policy = recorder_of(buffer_bytes=3 * 2100)
    episode = policy.episode("robot", None)
    assert episode is not None
    for number in range(1, 6):
        take(episode, number)
    recorder.rows.clear()
    recorder.budget.written_bytes = recorder.budget.copied_bytes  # there is room again
    take(episode, 6)
    recorded = policy.recorded.outcomes["recorded"]
    assert 0 < recorded < 5
    assert policy.recorded.outcomes["buffer"] == 6 - recorded
    assert policy.recorded.ended == {episode.id: recorded + 1}


def test_a_step_that_is_not_committed_is_not_recorded() -> None:
    recorder, policy = recorder_of()
    episode = policy.session("an id", "session", None)
    assert episode is not None
    assert policy.session("an id", "session", None) is episode
    lost, taken = episode.step(1), episode.step(1)
    for step in (lost, taken):
        step.capture(*batch(1, is_init=True), slice(0, 1), 0)
    taken.commit()
    taken.commit()
    assert [rows.step for _, rows in recorder.rows] == [1]
    assert "an id" not in episode.id


def test_the_copies_are_the_recorders_own() -> None:
    """The memory of a batch is used again as soon as the clients are answered."""
    recorder, policy = recorder_of()
    request = policy.request(None)
    assert request is not None
    inputs, outputs = batch(1, size=3)
    expected = inputs["screen"][1:3].copy()
    request.capture(inputs, outputs, slice(1, 3), 0)
    inputs["screen"][:] = 0
    ((_, rows),) = recorder.rows
    assert np.array_equal(rows.tensors["observation.screen"], expected)


def test_a_recorder_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(StepRecorder):
        def capture(self, inputs: Arrays, outputs: Arrays, items: slice, run_ns: int) -> None:
            raise KeyError("is_init")

        def commit(self) -> None:
            pass

    async def act() -> Arrays:
        batcher = Batcher(lambda inputs: {"y": inputs["x"] + 1}, 8, 8, quick=True)
        batcher.start()
        answer = await batcher.submit({"x": np.array([1, 2])}, 2, recorder=Failing())
        await batcher.close()
        return answer.outputs

    assert asyncio.run(act())["y"].tolist() == [2, 3]
    assert "a step could not be recorded" in caplog.text


def test_counts_of_many_versions_are_bounded() -> None:
    recorder = Recorder("", Unlimited(1.0), 1 << 20)
    for version in range(2 * KEPT_VERSIONS):
        recorder.of(artifact(version), "onnx")
    assert [recorded.artifact.manifest.version for recorded in recorder.recorded] == list(
        range(KEPT_VERSIONS, 2 * KEPT_VERSIONS)
    )


# the shards


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec("a", "uint8", ()),
        TensorSpec("a", "bool", (3,)),
        TensorSpec("a", "float16", (2, 2)),
        TensorSpec("a", "bfloat16", (2,)),
        TensorSpec("a", "int64", (100,)),
        TensorSpec("a", "bool", (9, 9)),
        TensorSpec("a", "float64", (0, 3)),
    ],
    ids=str,
)
def test_every_kind_of_tensor_comes_back(tmp_path: Path, spec: TensorSpec) -> None:
    signature = Signature((spec,), (TensorSpec("action", spec.dtype, spec.shape),), 4)
    recorder = Recorder("", Unlimited(1.0), 1 << 20)
    policy = recorder.of(artifact(signature=signature), "onnx")
    rng = np.random.default_rng(0)
    seen, done = ([s.sample(rng, 2) for _ in range(3)] for s in (spec, signature.action))
    for each, action in zip(seen, done, strict=True):
        request = policy.request(None)
        assert request is not None
        request.capture({"a": each}, {"action": action}, slice(0, 2), 0)
    header = Header.of(artifact(signature=signature), "onnx", "w", 0)
    shard = ShardWriter(tmp_path / "a.parquet", header)
    shard.write([rows for _, rows in recorder.rows])
    shard.close({}, {})
    found = arrays_of(pq.read_table(tmp_path / "a.parquet"), signature)
    assert np.array_equal(found["observation.a"], np.concatenate(seen))
    assert np.array_equal(found["output.action"], np.concatenate(done))


def test_a_batch_of_arrow_has_every_column() -> None:
    header = Header.of(artifact(), "onnx", "w", 0)
    recorder, policy = recorder_of()
    episode = policy.episode("stream", "anna")
    assert episode is not None
    for number in (1, 2):
        take(episode, number)
    table = Columns(schema(header), SIGNATURE).batch([rows for _, rows in recorder.rows])
    assert set(tensor_columns(SIGNATURE)) < set(table.schema.names)
    assert table.column("client").to_pylist() == ["anna", "anna"]
    assert table.column("follows").to_pylist() == [0, 1]
    assert table.column("state.memory").null_count == 2


# the writer


def write(folder: Path, steps: int = 3) -> Recorder:
    recorder, policy = recorder_of()
    with Writer(recorder, folder):
        episode = policy.episode("stream", None)
        assert episode is not None
        for number in range(1, steps + 1):
            take(episode, number)
    return recorder


def test_a_shard_is_complete_when_the_writer_ends(tmp_path: Path) -> None:
    recorder = write(tmp_path / "new" / "folder")
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert path.name.startswith(f"{NAME}@1-")
    assert recorder.file_bytes == path.stat().st_size
    (summary,) = Recording(path.parent).summaries()
    assert (summary.policy, summary.version, summary.episodes, summary.steps, summary.incomplete) == (NAME, 1, 1, 3, 0)
    assert [step.is_last for step in steps_in(path.parent, NAME)] == [False, False, True]


def test_a_shard_is_complete_after_some_seconds(tmp_path: Path, clock: Clock) -> None:
    recorder, policy = recorder_of()
    with Writer(recorder, tmp_path, clock=clock):
        episode = policy.episode("stream", None)
        assert episode is not None
        take(episode, 1)
        until(lambda: bool(list(tmp_path.glob(f"{TEMPORARY}*"))))
        assert not list(tmp_path.glob("robot@*"))
        clock.now_s += SHARD_S
        until(lambda: bool(list(tmp_path.glob("robot@*"))))
        assert len(steps_in(tmp_path, NAME)) == 1


def test_an_incomplete_episode_is_marked(tmp_path: Path) -> None:
    recorder, policy = recorder_of()
    with Writer(recorder, tmp_path):
        episode = policy.episode("stream", None)
        assert episode is not None
        take(episode, 1)
        recorder._buffer_bytes = 0
        take(episode, 2)
    (summary,) = Recording(tmp_path).summaries()
    assert (summary.steps, summary.incomplete) == (1, 1)


def test_a_shard_may_have_feedback_alone(tmp_path: Path) -> None:
    """The steps are in an earlier shard, and the operator has deleted it."""
    recorder, policy = recorder_of()
    with Writer(recorder, tmp_path):
        episode = policy.session("an id", "session", None)
        assert episode is not None
        take(episode, 1)
        until(lambda: not recorder.rows)
        policy.recorded.feedback["other"] = Feedback(1.0, True)
    shard = ShardWriter(tmp_path / "robot@2.parquet", Header.of(artifact(2), "onnx", "w", 0))
    shard.close({}, {"other": Feedback(None, True)})
    assert [(each.version, each.steps) for each in Recording(tmp_path).summaries()] == [(1, 1)]
    assert Recording(tmp_path).shards[-1].feedback == {"other": (None, True)}


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("method", ["__init__", "write", "close"])
def test_a_full_disk_stops_the_recording_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    monkeypatch.setattr(ShardWriter, method, full)
    recorder = write(tmp_path)
    assert recorder.stopped == "No space left on device"
    assert list(tmp_path.iterdir()) == []
    assert "has stopped: No space left on device" in caplog.text
    policy = recorder.of(artifact(), "onnx")
    assert policy.request(None) is None
    assert policy.recorded.counts()["stopped"] == 1


def test_the_reason_for_a_stop_has_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, f"Failed to open local file '{tmp_path}'")

    monkeypatch.setattr(ShardWriter, "write", fail)
    assert write(tmp_path).describe()["stopped"] == os.strerror(errno.EIO)


def test_a_disk_is_not_filled_to_the_last_byte(tmp_path: Path) -> None:
    recorder, policy = recorder_of()
    with Writer(recorder, tmp_path, free_bytes=lambda _: writers.FREE_BYTES - 1):
        episode = policy.episode("stream", None)
        assert episode is not None
        take(episode, 1)
    assert recorder.stopped == "the disk has less than 256 MB left"


KILLED = """
import sys
from pathlib import Path
from actserve.recording.writer import Writer
from tests.test_recording import recorder_of, take

recorder, policy = recorder_of()
with Writer(recorder, Path(sys.argv[1])):
    episode = policy.episode("stream", None)
    number = 0
    while True:
        number += 1
        take(episode, number)
        print(number, flush=True)
        sys.stdin.readline()
"""


def test_a_killed_writer_leaves_no_torn_shard(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        until(lambda: bool(list(tmp_path.glob(f"{TEMPORARY}*"))))
        prepare(tmp_path)
        assert len(list(tmp_path.iterdir())) == 1  # it is alive: its shard stays
        process.send_signal(signal.SIGKILL)
    with pytest.raises(UsageError, match="expected a folder with a recording"):
        Recording(tmp_path)
    prepare(tmp_path)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path)
    assert len(steps_in(tmp_path, NAME)) == 3


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="expected a folder for the recording"):
        prepare(tmp_path / "file")


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"PAR1" + bytes(100)])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    write(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptRecording, match="cannot be read"):
        Recording(tmp_path)


def test_a_damaged_page_is_noticed(tmp_path: Path) -> None:
    write(tmp_path)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(list(pq.read_schema(path).names).index("observation.screen"))
    data[column.data_page_offset + column.total_compressed_size - 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptRecording, match="cannot be read"):
        steps_in(tmp_path, NAME)


def test_other_parquet_files_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    (path,) = tmp_path.iterdir()
    table = pq.read_table(path).replace_schema_metadata({})
    pq.write_table(table, tmp_path / "other.parquet")
    with pytest.raises(CorruptRecording, match=r"other\.parquet: expected a shard"):
        Recording(tmp_path)


def test_settings_turn_it_on() -> None:
    assert recorder_for(Settings()) is None
    settings = Settings.from_environment({"ACTSERVE_RECORD": "there", "ACTSERVE_RECORD_EXCEPT": "anna, bob"})
    recorder = recorder_for(settings)
    assert recorder is not None
    assert (recorder.where, sorted(recorder.excluded)) == ("there", ["anna", "bob"])
