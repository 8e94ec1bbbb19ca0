"""How many threads a call takes: the cores, who else runs, and what was measured. No times are compared."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actserve.cli.commands.tune import threads_of
from actserve.core.errors import RuntimeFailure
from actserve.core.settings import Settings
from actserve.core.signature import Array, Arrays
from actserve.engine import cores, threads
from actserve.engine.calls import Calls
from actserve.engine.policy import Policy
from actserve.engine.runtimes.base import Runtime
from actserve.engine.runtimes.load import RUNTIMES
from actserve.engine.runtimes.onnx_runtime import OnnxRuntime
from actserve.engine.threads import ElasticRuntime
from actserve.engine.tuning import QUICK_NS, Run, Tuning, measure_wide, tuned
from actserve.engine.tuning.tuned import Tuned
from actserve.store.artifact import Artifact
from tests.fake_policy import SIGNATURE, DigestRuntime

SLOW = {1: 2 * QUICK_NS, 2: 2 * QUICK_NS}
FASTER = {1: QUICK_NS, 2: QUICK_NS}
BATCH = {"observation": np.zeros((1, 4), np.float32)}


@pytest.fixture
def own(cart: Artifact, tmp_path: Path) -> Artifact:
    """A copy of a policy, to write beside."""
    folder = tmp_path / "store" / cart.manifest.name / str(cart.manifest.version)
    shutil.copytree(cart.folder, folder)
    return replace(cart, folder=folder)


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (threads, tuned):
        monkeypatch.setattr(module, "usable_cores", lambda: 4)


def onnx(shared: Path | None = None, **changes: Any) -> Settings:
    return Settings(runtime="onnx", shared=shared, **changes)


# The cores.


def groups(tmp_path: Path, own_text: str, **files: str) -> float:
    (tmp_path / "cgroup").write_text(own_text)
    for name, text in files.items():
        file = tmp_path / "mounted" / name.replace("__", "/").replace("_of_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return cores.quota(tmp_path / "cgroup", tmp_path / "mounted")


@pytest.mark.parametrize(
    ("own_text", "files", "cpus"),
    [
        ("0::/\n", {}, math.inf),
        ("0::/\n", {"cpu_of_max": "max 100000\n"}, math.inf),
        ("0::/\n", {"cpu_of_max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"cpu_of_max": "max 100000\n", "a__cpu_of_max": "200000 100000\n"}, 2.0),
        ("0::/a\n", {"a__cpu_of_max": "400000 100000", "cpu_of_max": "300000 100000"}, 3.0),
        ("0::/../b\n", {"cpu_of_max": "200000 100000\n"}, 2.0),  # outside of a container's own groups
        ("1:cpu,cpuacct:/a\n", {"cpu__a__cpu.cfs_quota_us": "50000", "cpu__a__cpu.cfs_period_us": "100000"}, 0.5),
        ("1:cpu:/\n", {"cpu__cpu.cfs_quota_us": "-1", "cpu__cpu.cfs_period_us": "100000"}, math.inf),
        ("0::/\n", {"cpu_of_max": "nonsense"}, math.inf),
    ],
)
def test_the_quota_is_the_smallest_of_all_groups(
    tmp_path: Path, own_text: str, files: dict[str, str], cpus: float
) -> None:
    assert groups(tmp_path, own_text, **files) == cpus


def test_a_process_has_at_least_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "quota", lambda own, mounted: 0.5)
    assert cores.usable_cores() == 1
    monkeypatch.setattr(cores, "quota", lambda own, mounted: math.inf)
    assert cores.usable_cores() >= 1


# Who runs.


def test_a_call_is_alone_if_no_other_runs_when_it_begins(tmp_path: Path) -> None:
    with Calls(tmp_path / "calls") as one, Calls(tmp_path / "calls") as other:
        with one.enter() as first:
            with other.enter() as second:
                pass
            with other.enter() as third:
                pass
        with other.enter() as fourth:
            pass
    assert (first, second, third, fourth) == (True, False, False, True)


def test_under_load_no_call_is_alone(tmp_path: Path) -> None:
    """The calls of two workers overlap all the time: one begins before the other ends."""
    with Calls(tmp_path / "calls") as one, Calls(tmp_path / "calls") as other:
        running = one.enter()
        found = [running.__enter__()]
        for calls in (other, one, other):
            following = calls.enter()
            found.append(following.__enter__())
            running.__exit__(None, None, None)
            running = following
        running.__exit__(None, None, None)
    assert found == [True, False, False, False]


def test_without_a_file_every_call_is_alone() -> None:
    with Calls(None) as calls, calls.enter() as alone, Calls(None) as others, others.enter() as too:
        assert alone
        assert too


def test_without_locks_no_call_is_alone(tmp_path: Path) -> None:
    with Calls(tmp_path / "missing" / "calls") as calls, calls.enter() as alone:
        assert not alone


def test_a_measurement_waits_for_the_calls_and_not_for_ever(tmp_path: Path) -> None:
    now_s = iter((0.0, 0.5, 2.0))
    with Calls(tmp_path / "calls") as one, Calls(tmp_path / "calls") as other:
        with one.enter(), other.exclude(1.0, lambda: next(now_s)) as quiet:
            assert not quiet
        with other.exclude(1.0) as quiet, one.enter() as alone:
            assert quiet
            assert not alone


# Which program runs.


class Fixed(DigestRuntime):
    """Says how many threads it has."""

    def __init__(self, threads: int = 1) -> None:
        super().__init__(1)
        self.threads = threads
        self.closed = False

    def run(self, batch: Any) -> Arrays:
        return {"threads": np.array([self.threads])}

    def close(self) -> None:
        self.closed = True


def threads_taken(runtime: ElasticRuntime, size: int = 1) -> int:
    return int(runtime.run({"x": np.zeros(size, np.int64)})["threads"][0])


def test_a_call_takes_all_cores_while_no_other_runs(tmp_path: Path) -> None:
    narrow, wide = Fixed(1), Fixed(4)
    runtime = ElasticRuntime(narrow, wide, 2, Calls(tmp_path / "calls"))
    assert (threads_taken(runtime, 1), threads_taken(runtime, 2)) == (1, 4)
    with Calls(tmp_path / "calls") as others, others.enter():
        assert threads_taken(runtime, 2) == 1
    assert threads_taken(runtime, 8) == 4
    runtime.close()
    assert narrow.closed
    assert wide.closed


def test_the_size_from_which_on_all_cores_pay() -> None:
    assert Tuning(SLOW).wide_from is None
    assert Tuning(SLOW, 4, FASTER).wide_from == 1
    assert Tuning(SLOW, 4, SLOW).wide_from is None
    assert Tuning({1: 100, 2: 100, 4: 100}, 4, {1: 96, 2: 95, 4: 50}).wide_from == 2


def test_both_are_measured_in_turns() -> None:
    order: list[str] = []

    def run(name: str) -> Run:
        def count(batch: Mapping[str, Array]) -> Arrays:
            order.append(name)
            return {}

        return count

    before = Tuning({1: 10**12, 2: 5})
    after = measure_wide(before, run("narrow"), run("wide"), 4, SIGNATURE)
    assert order[:5] == ["wide", "narrow", "wide", "narrow", "wide"]
    assert after.threads == 4
    assert after.wide_ns.keys() == before.item_ns.keys()
    assert after.item_ns[1] < before.item_ns[1]


def test_waiting_for_a_core_counts_for_neither() -> None:
    """All cores are taken for a while: a call with all threads waits for them, longer than one with one thread."""

    def works(batch: Mapping[str, Array]) -> Arrays:
        sum(range(300_000))
        return {}

    def waits(batch: Mapping[str, Array]) -> Arrays:
        time.sleep(0.05)
        return {}

    assert measure_wide(Tuning(SLOW), works, waits, 4, SIGNATURE).wide_from == 1


def served(policy: Policy) -> type:
    kind = type(policy._runtime)
    asyncio.run(policy.close())
    return kind


@pytest.mark.parametrize(
    ("tuning", "kind"),
    [(Tuning(SLOW, 4, FASTER), ElasticRuntime), (Tuning(SLOW, 4, SLOW), Runtime), (Tuning({1: 1000}), Runtime)],
)
def test_what_was_measured_decides(own: Artifact, tmp_path: Path, tuning: Tuning, kind: type) -> None:
    Tuned({"onnx": tuning}).save(own)
    policy = Policy.load(own, onnx(tmp_path))
    assert policy.tuning == tuning
    assert np.isfinite(policy._runtime.run(BATCH)["action_value"]).all()
    assert issubclass(served(policy), kind)


def test_a_fixed_number_of_threads_is_not_measured(own: Artifact, tmp_path: Path) -> None:
    Tuned({"onnx": Tuning(SLOW, 4, FASTER)}).save(own)
    assert issubclass(served(Policy.load(own, onnx(tmp_path, threads=1))), Runtime)
    assert issubclass(served(Policy.load(own, onnx(tmp_path, threads=2))), Runtime)


def test_one_worker_measures_and_the_others_take_its_result(
    own: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Tuning] = []

    def told(tuning: Tuning, narrow: Run, wide: Run, count: int, signature: object) -> Tuning:
        measured.append(Tuning(SLOW, count, FASTER))
        return measured[-1]

    monkeypatch.setattr(threads, "measure", lambda run, signature: Tuning(SLOW))
    monkeypatch.setattr(threads, "measure_wide", told)
    (tmp_path / "shared").mkdir()
    policies = [Policy.load(own, onnx(tmp_path / "shared")) for _ in range(3)]
    assert [policy.tuning for policy in policies] == measured * 3
    assert {served(policy) for policy in policies} == {ElasticRuntime}
    assert Policy.load(own, onnx()).tuning == measured[1]  # a service without workers


class Failing(OnnxRuntime):
    """A program that cannot have more threads, or gives other answers with them."""

    error: RuntimeFailure | None = None

    def with_threads(self, threads: int) -> Failing:
        if self.error:
            raise self.error
        return Failing(self._artifact, threads, None, self._session, None)

    def _run(self, arrays: list[Array]) -> list[Array]:
        return [array + (self._threads > 1) for array in super()._run(arrays)]


@pytest.mark.parametrize("error", [None, RuntimeFailure("no memory")])
def test_a_program_that_fails_with_more_threads_has_one(
    own: Artifact, monkeypatch: pytest.MonkeyPatch, error: RuntimeFailure | None
) -> None:
    monkeypatch.setattr(Failing, "error", error)
    monkeypatch.setitem(RUNTIMES, "onnx", "tests.test_threads:Failing")
    Tuned({"onnx": Tuning(SLOW, 4, FASTER)}).save(own)
    assert issubclass(served(Policy.load(own, onnx())), Runtime)


# What `actserve tune` keeps and says.


def test_tuned_files_hold_both_and_older_ones_are_valid(own: Artifact) -> None:
    both = Tuned({"onnx": Tuning(SLOW, 4, FASTER), "pt2": Tuning({1: 1000})})
    file = both.save(own)
    assert Tuned.load(own) == both
    saved = json.loads(file.read_text())
    changes: list[tuple[Callable[[dict[str, Any]], object], Tuned | None]] = [
        (lambda document: document.pop("wide"), Tuned({"onnx": Tuning(SLOW), "pt2": Tuning({1: 1000})})),
        (
            lambda document: document["wide"]["onnx"].update(threads=8),
            Tuned({"onnx": Tuning(SLOW), "pt2": Tuning({1: 1000})}),
        ),
        (lambda document: document["wide"]["onnx"].pop("threads"), None),
        (lambda document: document["wide"]["onnx"].update(item_ns={"32": 1}), None),
        (lambda document: document["wide"]["onnx"].update(item_ns={"1": 0}), None),
        (lambda document: document.update(wide=[]), None),
    ]
    for change, expected in changes:
        document = json.loads(json.dumps(saved))
        change(document)
        file.write_text(json.dumps(document))
        assert Tuned.load(own) == expected


@pytest.mark.parametrize(
    ("tuning", "text"),
    [
        (Tuning({1: 1000}), "a call takes one thread; it is quick"),
        (Tuning(SLOW), "a call takes one thread"),
        (Tuning(SLOW, 4, SLOW), "a call takes one thread; 4 are not faster"),
        (Tuning(SLOW, 4, FASTER), "a call takes 4 threads while no other slow call of the service runs (3.0 ms), "),
        (Tuning(SLOW, 4, {1: SLOW[1], 2: FASTER[2]}), "a call of 2 items or more takes 4 threads while"),
    ],
)
def test_tune_says_what_was_chosen(tuning: Tuning, text: str) -> None:
    assert threads_of(tuning).startswith(text)
