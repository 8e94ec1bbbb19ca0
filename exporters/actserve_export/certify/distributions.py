"""Statistical tests: the program's actions from noise inputs have the same distribution as the policy's own draws.

These are two-sample tests on many draws for one observation: the chi-square test of homogeneity for discrete actions,
and the Kolmogorov-Smirnov test for each component of continuous actions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from actserve.core.completion import complete
from actserve.core.errors import Disagreement
from actserve.core.signature import Array, Arrays, Exploration
from actserve_export.capture.tensordict_policy import TracedPolicy
from actserve_export.sources.interfaces import CapturedPolicy, ExportSource
from actserve_export.sources.policy_source import PolicySource

DRAWS = 4096
MAX_KINDS = 64  # actions; floating-point actions of more kinds are continuous
LEVEL = 1e-4  # one correct export in ten thousand fails


def compare(captured: CapturedPolicy, source: ExportSource, inputs: Arrays) -> dict[str, Any]:
    """Draw `DRAWS` actions for one observation both ways, and test. Raises `Disagreement` if p is below `LEVEL`."""
    signature = captured.signature
    one = {spec.name: np.repeat(inputs[spec.name][:1], DRAWS, 0) for spec in signature.observations}
    mode: Exploration = "random"
    full = complete(signature, one, DRAWS, mode, seed=0).inputs
    ours = captured.run_reference({spec.name: full[spec.name] for spec in signature.inputs})[signature.action.name]
    theirs = _own(captured, source, full)
    test, value = _test(ours, theirs)
    if value < LEVEL:
        raise Disagreement(
            f"the actions drawn from noise inputs are not distributed as the policy's own: {test}, "
            f"p = {value:.2g} over {DRAWS} draws, below {LEVEL}",
            p=value,
        )
    return {"test": test, "draws": DRAWS, "level": LEVEL, "p": value}


def _own(captured: CapturedPolicy, source: ExportSource, full: Arrays) -> Array:
    """`DRAWS` actions of the policy as TorchRL runs it, with its own randomness."""
    assert isinstance(captured, TracedPolicy)  # an .onnx file has no noise
    assert isinstance(source, PolicySource)
    layout = captured.layout
    tensordict = TensorDict({}, batch_size=[DRAWS])
    keys = {**layout.observations, **{name: read for name, (read, _) in layout.states.items()}}
    for name, key in keys.items():
        tensordict.set(key, torch.from_numpy(full[name]))
    tensordict.set("is_init", torch.ones(DRAWS, 1, dtype=torch.bool))
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM), torch.random.fork_rng():
        torch.manual_seed(0)
        result = source.policy(tensordict)
    (key, *_) = layout.outputs.values()
    actions: Array = result.get(key).numpy()
    return actions


def _test(ours: Array, theirs: Array) -> tuple[str, float]:
    from scipy import stats  # takes a second, and few policies draw

    ours, theirs = ours.reshape(len(ours), -1), theirs.reshape(len(theirs), -1)
    kinds, where = np.unique(np.concatenate([ours, theirs]), axis=0, return_inverse=True)
    if len(kinds) == 1:
        return "chi-square, two samples", 1.0
    if ours.dtype.kind == "f" and len(kinds) > MAX_KINDS:
        values = [stats.ks_2samp(ours[:, i], theirs[:, i], method="asymp").pvalue for i in range(ours.shape[1])]
        return "Kolmogorov-Smirnov, two samples, Bonferroni", float(min(1.0, min(values) * len(values)))
    half = len(ours)
    where = where.reshape(-1)
    table = np.stack([np.bincount(part, minlength=len(kinds)) for part in (where[:half], where[half:])])
    return "chi-square, two samples", float(stats.chi2_contingency(table).pvalue)
