"""Is a log-probability that the policy writes the one of the action that it returns?

It is not, if the action is changed after it was drawn (projected to a spec, clamped, or with exploration noise), and if
it was drawn so far in the tails of a `TanhNormal` that float32 cannot hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import CompositeDistribution, ProbabilisticTensorDictModule
from torch import Tensor, nn

from actserve_export.sources.keys import Key

TOLERANCE = 1e-2  # absolute and relative: of arithmetic in float32
Check = Callable[[TensorDictBase], None]


@contextmanager
def misplaced_log_probs(policy: nn.Module) -> Iterator[tuple[set[Key], Check]]:
    """Observe runs of `policy`. Gives (the keys that are wrong, a function to call with the result of each run)."""
    wrong: set[Key] = set()
    drawn: list[tuple[Any, Key, Key]] = []  # (distribution, key of the sample, key of its log-probability)

    def note(module: Any, _: Any, result: Any) -> None:
        distribution, samples = module.get_dist(result), module.dist_sample_keys
        if isinstance(distribution, CompositeDistribution):
            heads = [distribution.dists[key] for key in samples]
            drawn.extend(zip(heads, samples, module.log_prob_keys, strict=True))
        elif len(samples) == len(module.log_prob_keys) == 1:
            drawn.append((distribution, samples[0], module.log_prob_keys[0]))

    def check(result: TensorDictBase) -> None:
        for distribution, sample, log_prob in drawn:
            found, action = result.get(log_prob), result.get(sample)
            if not _close(found, distribution, action):
                wrong.add(log_prob)
        drawn.clear()

    hooks = [module.register_forward_hook(note) for module in writers(policy)]
    try:
        yield wrong, check
    finally:
        for hook in hooks:
            hook.remove()


def writers(policy: nn.Module) -> list[ProbabilisticTensorDictModule]:
    """The modules of `policy` that write a log-probability."""
    return [
        module
        for module in policy.modules()
        if isinstance(module, ProbabilisticTensorDictModule) and module.return_log_prob
    ]


def _close(found: Tensor, distribution: Any, action: Tensor) -> bool:
    """Whether `found` is the log-probability of `action`, and of the next number that float32 can hold."""
    candidates = [action]
    if action.is_floating_point():
        candidates.append(torch.nextafter(action, torch.zeros_like(action)))
    try:
        expected = [distribution.log_prob(candidate) for candidate in candidates]
    except ValueError:  # outside of the distribution's support
        return False
    return all(bool(torch.allclose(found, each, TOLERANCE, TOLERANCE, equal_nan=True)) for each in expected)
