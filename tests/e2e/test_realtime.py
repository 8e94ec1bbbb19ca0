"""`Realtime` through a slow network, with a real service."""

from __future__ import annotations

import numpy as np

from actserve import Realtime
from actserve.cli.tools import local_service as local
from tests.benchmarks.realtime import DELAY_S, PERIOD_S, delayed
from tests.exported import exported


def test_every_action_is_the_one_for_its_period_though_each_answer_is_late() -> None:
    """On a busy machine a chunk may come too late: then the last action is held."""
    store = exported("tests.policies:planner", ("onnx",)).root
    with local.serve(store, "--runtime", "onnx") as service, delayed(service.url) as url:
        before = -1.0
        with Realtime(url, "planner", period_s=PERIOD_S) as loop:
            for tick in loop:
                action = float(loop.act(np.array([float(tick)], np.float32))[0])
                assert action == (before if tick in loop.report.starved_at else tick)
                before = action
                if loop.report.answers == 12:
                    break
    assert min(loop.report.answer_ms) > 1000 * DELAY_S / 2
    assert loop.report.ticks > 2 * loop.report.answers
