"""Statistical tests: the program's actions from noise inputs have the same distribution as the policy's own draws.

These are two-sample tests on many draws for one observation: the chi-square test of homogeneity for discrete actions,
and the Kolmogorov-Smirnov test for each component of continuous actions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from actserve.core.completion import complete
from actserve.core.errors import Disagreement
from actserve.core.signature import IS_INIT, Array, Arrays, Exploration
from actserve_export.capture.tensordict_policy import TracedPolicy
from actserve_export.certify.as_given import act, as_trained
from actserve_export.sources.interfaces import CapturedPolicy, ExportSource
from actserve_export.sources.policy_source import PolicySource

MAX_KINDS = 64  # actions; floating-point actions of more kinds are continuous
LEVEL = 1e-4  # one correct export in ten thousand fails


def compare(captured: CapturedPolicy, source: ExportSource, inputs: Arrays, draws: int) -> dict[str, Any]:
    """Draw `draws` actions for one observation both ways, and test every output that the draws change.

    Raises `Disagreement` if p is below `LEVEL`.
    """
    signature = captured.signature
    one = {spec.name: np.repeat(inputs[spec.name][:1], draws, 0) for spec in signature.observations}
    mode: Exploration = "random"
    full = complete(signature, one, draws, mode, seed=0).inputs
    ours = captured.run_reference({spec.name: full[spec.name] for spec in signature.inputs})
    assert isinstance(captured, TracedPolicy)  # an .onnx file has no noise
    assert isinstance(source, PolicySource)
    begins = {IS_INIT.name: np.ones(draws, bool)} if signature.is_init else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = act(captured, as_trained(source, draws), full | begins, mode)
    # Log-probabilities follow from the actions, and are compared for equal noise.
    theirs = {name: theirs[name] for name in captured.layout.outputs if not name.endswith("log_prob")}
    drawn = [name for name in theirs if name == signature.action.name or _varies(ours[name]) or _varies(theirs[name])]
    test, value = min((_test(ours[name], theirs[name]) for name in drawn), key=lambda found: found[1])
    value = min(1.0, value * len(drawn))  # Bonferroni
    if value < LEVEL:
        raise Disagreement(
            f"the actions drawn from noise inputs are not distributed as the policy's own: {test}, "
            f"p = {value:.2g} over {draws} draws, below {LEVEL}",
            p=value,
        )
    return {"test": test, "draws": draws, "level": LEVEL, "p": value}


def _varies(values: Array) -> bool:
    """Whether values (n, ...) of one observation differ by more than the order of additions explains."""
    values = values.reshape(len(values), -1).astype(np.float64)
    spread = values.max(0) - values.min(0)
    return bool((spread > 1e-4 * np.maximum(1, np.abs(values[0]))).any())


def _test(ours: Array, theirs: Array) -> tuple[str, float]:
    ours, theirs = ours.reshape(len(ours), -1), theirs.reshape(len(theirs), -1)
    kinds, where = np.unique(np.concatenate([ours, theirs]), axis=0, return_inverse=True)
    if len(kinds) == 1:
        return "chi-square, two samples", 1.0
    if ours.dtype.kind == "f" and len(kinds) > MAX_KINDS:
        values = [kolmogorov_smirnov(ours[:, i], theirs[:, i]) for i in range(ours.shape[1])]
        return "Kolmogorov-Smirnov, two samples, Bonferroni", min(1.0, min(values) * len(values))
    half = len(ours)
    where = where.reshape(-1)
    counts = [np.bincount(part, minlength=len(kinds)) for part in (where[:half], where[half:])]
    return "chi-square, two samples", chi_square(*counts)


# Of the two tests, scipy.special has what is hard to compute. scipy.stats has them whole, and takes 1 s to import.


def kolmogorov_smirnov(ours: Array, theirs: Array) -> float:
    """The p-value of two samples, (n,) and (m,), by the limiting distribution (Kolmogorov 1933, Smirnov 1948)."""
    from scipy.special import kolmogorov

    ours, theirs = np.sort(ours), np.sort(theirs)
    everywhere = np.concatenate([ours, theirs])
    shares = [np.searchsorted(sample, everywhere, side="right") / len(sample) for sample in (ours, theirs)]
    distance = np.abs(shares[0] - shares[1]).max()
    return float(kolmogorov(distance * np.sqrt(len(ours) * len(theirs) / len(everywhere))))


def chi_square(ours: Array, theirs: Array) -> float:
    """The p-value of homogeneity of two counts by kind, (kinds,) each, none of which is zero in both (Pearson 1900).

    With one degree of freedom, Yates's correction applies.
    """
    from scipy.special import chdtrc

    table = np.stack([ours, theirs]).astype(np.float64)
    expected = table.sum(0) * table.sum(1, keepdims=True) / table.sum()
    freedom = table.shape[1] - 1
    gaps = np.abs(table - expected)
    gaps -= np.minimum(0.5, gaps) if freedom == 1 else 0.0
    return float(chdtrc(freedom, (gaps**2 / expected).sum()))
