"""Every class of `torchrl.modules` has a row in the table of kinds, or a reason why not."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torchrl.modules
from tensordict.nn import CompositeDistribution, ProbabilisticTensorDictModule
from torch import nn

from tests import kinds
from tests.survey import POLICIES
from tests.survey.__main__ import recorded

CLASSES = {name for name in torchrl.modules.__all__ if inspect.isclass(getattr(torchrl.modules, name))}


def parts(policy: nn.Module) -> Iterator[Any]:
    """The classes of what a policy runs: its modules, their hooks, and its distributions."""
    for module in policy.modules():
        yield type(module)
        for hook in module._forward_hooks.values():
            yield type(hook)
            yield type(getattr(hook, "qvalue_model", None))
        if isinstance(module, ProbabilisticTensorDictModule):
            yield module.distribution_class
            if module.distribution_class is CompositeDistribution:
                yield from module.distribution_kwargs["distribution_map"].values()


def has_row() -> set[str]:
    made = [factory() for factory in kinds.KINDS.values()]
    policies = [policy for policy, _ in made]
    found = {part for policy in policies for part in parts(policy) if inspect.isclass(part)}
    names = {getattr(torchrl.modules, name): name for name in CLASSES}
    # A lazy module becomes another class when it first runs.
    lazy = {name for kind, name in names.items() if getattr(kind, "cls_to_become", None) in found}
    return lazy | {names[base] for part in found for base in part.__mro__ if base in names}


def test_every_class_has_a_row_or_a_reason() -> None:
    rows = has_row()
    assert CLASSES - rows - set(kinds.NO_ROW) == set()
    assert rows & set(kinds.NO_ROW) == set(), "a row makes the reason superfluous"
    assert set(kinds.NO_ROW) <= CLASSES, "torchrl.modules has no such class"
    assert set(kinds.TITLES) == set(kinds.KINDS)


def test_the_document_has_the_counts_of_the_survey() -> None:
    results = recorded()
    equal = [name for name, result in results.items() if result["status"] == "equal"]
    said = f"Of {len(POLICIES)} such policies, {len(results)} were examined so far, and {len(equal)} act as in TorchRL."
    assert said in " ".join(kinds.DOCUMENT.read_text().split())
