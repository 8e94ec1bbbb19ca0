"""The short form of the chaos benchmark: real processes, some faults, a client of every door."""

from __future__ import annotations

from tests.benchmarks import chaos

# Those that take no time of their own; all of them: python -m tests.benchmarks.chaos
FAULTS = ("kill worker", "stop all", "lock sessions", "fill disk", "flood")


def test_no_fault_leaves_a_wrong_answer_a_lost_state_or_a_silent_door() -> None:
    outcome = chaos.run(seconds=0, seed=0, faults=FAULTS, lasts_s=0.5, pause_s=0.1)
    assert outcome.problems(silent_s=chaos.WAIT_S - 1) == []
    assert set(outcome.silent_s) == set(FAULTS)
    assert all(door.right for door in outcome.doors.values())
