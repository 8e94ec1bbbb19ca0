"""Reads a recording: its shards, an index of its steps, and the steps in the order in which they were taken."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actserve.core.errors import CorruptRecording, UsageError, one_line
from actserve.core.signature import Array, Arrays, Exploration, Signature
from actserve.recording.shards import ENDED, FACTS, FEEDBACK, METADATA, SUFFIX, Header, arrays_of


@dataclass(frozen=True)
class Step:
    """One recorded step. `tensors` are by column, each (*shape); columns of state only if the row has the state."""

    episode: str
    step: int
    follows: int | None
    time: datetime
    door: str
    client: str | None
    seed: int | None
    item: int
    exploration: Exploration
    run_us: int
    previous_reward: float | None  # of the step before, as the client told it
    previous_done: bool | None
    version: int  # that acted
    writer: str
    tensors: Arrays
    is_last: bool  # of its episode, among the steps of this writer


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a recording."""

    path: Path
    header: Header
    steps: int
    ended: Mapping[str, int]  # incomplete episodes: the step that was dropped
    feedback: Mapping[str, tuple[float | None, bool | None]]  # on last steps: reward and done

    @staticmethod
    def open(path: Path) -> Shard:
        """Raises `CorruptRecording`."""
        try:
            metadata = pq.read_metadata(path)
            found = metadata.metadata or {}
            if METADATA not in found:
                raise CorruptRecording(f"{path.name}: expected a shard of a recording; got another Parquet file")
            ended = json.loads(found.get(ENDED, b"{}"))
            feedback = {name: tuple(each) for name, each in json.loads(found.get(FEEDBACK, b"{}")).items()}
            return Shard(path, Header.from_json(found[METADATA], path.name), metadata.num_rows, ended, feedback)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise CorruptRecording(f"{path.name} cannot be read: {one_line(error)}") from error

    def facts(self) -> Any:
        """A table of the columns beside the tensors."""
        return self._read(lambda file: file.read(list(FACTS)))

    def groups(self, rows: int) -> Iterator[Any]:
        """Tables of at most so many rows."""
        file = self._read(lambda file: file, close=False)
        try:
            for batch in file.iter_batches(rows):
                yield pa.Table.from_batches([batch])
        except (OSError, pa.ArrowException) as error:
            raise CorruptRecording(f"{self.path.name} cannot be read: {one_line(error)}") from error
        finally:
            file.close()

    def _read(self, read: Any, close: bool = True) -> Any:
        try:
            file = pq.ParquetFile(self.path, page_checksum_verification=True)
            try:
                return read(file)
            finally:
                if close:
                    file.close()
        except (OSError, pa.ArrowException) as error:
            raise CorruptRecording(f"{self.path.name} cannot be read: {one_line(error)}") from error


@dataclass(frozen=True)
class Summary:
    """One version of a policy in a recording."""

    policy: str
    version: int
    episodes: int
    steps: int
    incomplete: int  # episodes that end where a step was dropped
    first: datetime
    last: datetime
    size_bytes: int
    reward: float | None  # what an episode earned, on average over those whose clients told rewards
    doors: Mapping[str, int] = field(default_factory=dict)  # steps

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"first": self.first.isoformat(), "last": self.last.isoformat()}


class Recording:
    """The complete shards in a folder. Raises `UsageError` if there are none, and `CorruptRecording`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = sorted(folder.glob(f"*{SUFFIX}"))
        paths = [path for path in paths if not path.name.startswith(".")]
        if not paths:
            raise UsageError(f"expected a folder with a recording (*{SUFFIX}); {folder} has none")
        self.shards = sorted(map(Shard.open, paths), key=lambda shard: (shard.header.writer, shard.header.sequence))

    @property
    def policies(self) -> list[str]:
        return sorted({shard.header.policy for shard in self.shards})

    def named(self, label: str | None) -> tuple[str, int | None]:
        """The policy and the version that NAME[@VERSION] names; None: the only policy of the recording.

        Raises `UsageError`.
        """
        if label is None:
            if len(self.policies) > 1:
                raise UsageError(f"expected --policy, one of {', '.join(self.policies)}: the recording has several")
            return self.policies[0], None
        name, _, version = label.partition("@")
        if version and not version.isdecimal():
            raise UsageError(f"expected NAME or NAME@VERSION, with a whole number as the version; got {label!r}")
        return name, int(version) if version else None

    def of(self, policy: str, version: int | None = None) -> Steps:
        """The steps of a policy, of one version or of all. Raises `UsageError` if there are none."""
        shards = [shard for shard in self.shards if shard.header.policy == policy]
        if not shards:
            raise UsageError(f"expected a policy of the recording, {', '.join(self.policies)}; got {policy[:80]!r}")
        if version is not None:
            versions = sorted({shard.header.version for shard in shards})
            shards = [shard for shard in shards if shard.header.version == version]
            if not shards:
                raise UsageError(f"expected a recorded version of {policy}, {versions}; got {version}")
        return Steps(shards)

    def summaries(self) -> list[Summary]:
        """A summary of each version that has steps, by policy and version."""
        keys = sorted({(shard.header.policy, shard.header.version) for shard in self.shards if shard.steps})
        return [self.of(*key).summary() for key in keys]


@dataclass(frozen=True)
class Transitions:
    """All steps, by episode and step. Each array is (N,)."""

    row: Array  # int64: the number of each step in the order of `Steps.windows`
    trajectory: Array  # int64, from 0: steps that follow one another
    step: Array  # int64
    time: Array  # datetime64, UTC
    reward: Array  # float64; NaN: not known
    done: Array  # bool; False if it is not known
    is_last: Array  # bool: no recorded step follows

    def mean_return(self) -> float | None:
        """The mean sum of rewards, over the trajectories with known rewards; None if there are none."""
        known = ~np.isnan(self.reward)
        sums = np.bincount(self.trajectory, np.where(known, self.reward, 0.0))
        told = np.bincount(self.trajectory, known) > 0
        return float(sums[told].mean()) if told.any() else None


class Steps:
    """The steps in some shards of one policy."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = shards

    @property
    def count(self) -> int:
        return sum(shard.steps for shard in self.shards)

    @property
    def signature(self) -> Signature:
        """The signature of the newest version."""
        return self.newest.signature

    @property
    def newest(self) -> Header:
        """The header of the newest version."""
        return max((shard.header for shard in self.shards), key=lambda header: header.version)

    @cached_property
    def _last(self) -> dict[tuple[str, str], int]:
        """The last step of each episode, by writer and id."""
        found: dict[tuple[str, str], int] = {}
        for shard in self.shards:
            table = shard.facts()
            for episode, step in zip(table["episode"].to_pylist(), table["step"].to_pylist(), strict=True):
                found[shard.header.writer, episode] = step
        return found

    def summary(self) -> Summary:
        """A summary of all steps, which must be of one version."""
        header = self.shards[0].header
        episodes: set[str] = set()
        incomplete: set[str] = set()
        doors: Counter[str] = Counter()
        times: list[datetime] = []
        for shard in self.shards:
            table = shard.facts()
            episodes.update(table["episode"].to_pylist())
            doors.update(table["door"].to_pylist())
            incomplete.update(shard.ended)
            times += table["time"].to_pylist()[:: max(1, len(table) - 1)]  # the first one and the last one
        size = sum(shard.path.stat().st_size for shard in self.shards)
        return Summary(
            header.policy, header.version, len(episodes), self.count, len(incomplete & episodes), min(times),
            max(times), size, self.transitions().mean_return(), dict(doors),
        )  # fmt: skip

    def transitions(self) -> Transitions:
        """The order of all steps by episode, each with the feedback that came with the request after it."""
        tables = [shard.facts() for shard in self.shards]
        table = pa.concat_tables(tables)
        episodes = np.array(table["episode"].to_pylist())
        session = np.array([episode.partition(".")[0] for episode in episodes])
        step, time = table["step"].to_numpy(), table["time"].to_numpy()
        row = np.lexsort((time, step, session))
        episodes, session, step, time = episodes[row], session[row], step[row], time[row]
        follows = np.array(table["follows"].to_pylist(), np.float64)[row]  # NaN: the state is in the row
        joined = (session[1:] == session[:-1]) & (step[1:] > step[:-1])  # the next request of the same client
        goes_on = joined & (episodes[1:] == episodes[:-1]) & ((follows[1:] == step[:-1]) | (step[1:] == step[:-1] + 1))
        reward, done = np.full(len(row), np.nan), np.zeros(len(row), bool)
        told = np.array(table["previous_reward"].to_pylist(), np.float64)[row]
        ended = np.array([bool(value) for value in table["previous_done"].to_pylist()])[row]
        reward[:-1][joined], done[:-1][joined] = told[1:][joined], ended[1:][joined]
        feedback = {name: each for shard in self.shards for name, each in shard.feedback.items()}
        for place in np.flatnonzero(np.append(~joined, True)):
            last_reward, last_done = feedback.get(session[place], (None, None))
            reward[place] = np.nan if last_reward is None else last_reward
            done[place] = bool(last_done)
        goes_on &= ~done[:-1]
        trajectory = np.concatenate([[0], np.cumsum(~goes_on)])
        return Transitions(row, trajectory, step, time, reward, done, np.append(~goes_on, True))

    def windows(self, window_bytes: int) -> Iterator[list[Step]]:
        """The steps in order, in lists of about so many bytes. Each writer's come one after the other."""
        for shard in self.shards:
            signature = shard.header.signature
            item_bytes = sum(spec.item_bytes for spec in (*signature.request_inputs, *signature.outputs))
            for table in shard.groups(max(1, window_bytes // max(1, item_bytes))):
                yield list(self._steps(shard, table))

    def _steps(self, shard: Shard, table: Any) -> Iterator[Step]:
        header = shard.header
        tensors = arrays_of(table, header.signature)
        facts = {name: table[name].to_pylist() for name in FACTS}
        states = [name for name in tensors if name.startswith("state.")]
        for row in range(len(table)):
            values = {name: column[row] for name, column in facts.items()}
            kept = tensors if values["follows"] is None else {k: v for k, v in tensors.items() if k not in states}
            is_last = self._last[header.writer, values["episode"]] == values["step"]
            found: dict[str, Array] = {name: np.asarray(array[row]) for name, array in kept.items()}
            yield Step(**values, version=header.version, writer=header.writer, tensors=found, is_last=is_last)
