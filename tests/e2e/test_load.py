from __future__ import annotations

import pytest

from actserve.cli.tools import local_service as local
from actserve.loadtest.backends import BACKENDS
from actserve.loadtest.generator import load
from actserve.store.local import ModelStore


@pytest.mark.parametrize("runtime", ["onnx", "pt2"])
def test_a_recurrent_policy_answers_the_same_however_it_is_loaded(gru_store: ModelStore, runtime: str) -> None:
    with local.serve(gru_store.root, "--runtime", runtime) as service:
        for via in BACKENDS:
            for how in ({"concurrency": 4}, {"rate": 100.0}):
                report = load(service.url, via=via, duration_s=0.4, processes=1, **how)
                assert report.errors == {}, via
                assert report.requests > 4
