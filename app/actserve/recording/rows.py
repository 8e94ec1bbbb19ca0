"""Rows: the recorded steps of one request, on their way to the writer."""

from __future__ import annotations

from dataclasses import dataclass

from actserve.core.signature import EXPLORE, IS_INIT, Arrays, Signature
from actserve.engine.recorders import Door, Feedback

OBSERVATION, PARAMETER, STATE, OUTPUT = "observation.", "parameter.", "state.", "output."  # prefixes of columns


@dataclass(frozen=True, slots=True)
class Rows:
    """One row for each item. `tensors` are by column, each (n, *shape)."""

    episodes: list[str]
    step: int  # from 1
    follows: int | None  # the step whose state it began with; 0: the initial state; None: `tensors` has the state
    time_us: int  # since 1970
    door: Door
    client: str | None
    seed: int | None  # of the noise; item i of a request has the noise of (seed, first_item + i)
    first_item: int
    previous: Feedback | None  # of the step before
    run_us: int
    tensors: Arrays

    @property
    def size_bytes(self) -> int:
        return sum(array.nbytes for array in self.tensors.values())


def columns(signature: Signature) -> dict[str, str]:
    """The columns of the inputs and outputs that every row has, by the program's name of each input."""
    found = {spec.name: OBSERVATION + spec.name for spec in signature.observations}
    found |= {parameter.name: PARAMETER + parameter.name for parameter in signature.parameters}
    if signature.is_init:
        found[IS_INIT.name] = IS_INIT.name
    if len(signature.exploration) > 1:
        found[EXPLORE.name] = EXPLORE.name
    return found


def parts(signature: Signature, inputs: Arrays, outputs: Arrays, items: slice, with_state: bool) -> Arrays:
    """The tensors of the rows of `items`, each (n, *shape): views of a batch's inputs and outputs."""
    found = {column: inputs[name][items] for name, column in columns(signature).items()}
    if with_state:
        found |= {STATE + state.spec.name: inputs[state.spec.name][items] for state in signature.state}
    return found | {OUTPUT + name: outputs[name][items] for name in signature.output_names}
