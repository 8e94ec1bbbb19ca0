"""Over 400 small policies as TorchRL's docstrings and tutorials build them, by name, for `python -m tests.survey`.

Each is made by a function without arguments and is (policy, example) or a `PolicySource`. A family gives one kind of
policy in many forms: other networks, specs, distributions, ways to explore, transforms.
"""

from __future__ import annotations

from tests import kinds
from tests.survey.agents import agents
from tests.survey.control import continuous
from tests.survey.distributions import by_distribution
from tests.survey.modules import modules
from tests.survey.parts import Factory
from tests.survey.recurrence import recurrent
from tests.survey.transforms import transformed
from tests.survey.values import by_value

FAMILIES = (by_value, by_distribution, continuous, recurrent, transformed, agents, modules)
POLICIES: dict[str, Factory] = {f"kind {name}": factory for name, factory in kinds.KINDS.items()}
for family in FAMILIES:
    POLICIES |= {" ".join(name.split()): factory for name, factory in family()}
