"""Lazy layers take their size from the first batch that they see, and random weights: such a policy is untrained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor
from torch.nn import parameter
from torch.nn.parameter import is_lazy

from actserve.core.errors import CaptureFailed

_ADVICE = (
    "was never initialised: the policy has a lazy layer that never ran, so its weights would be random; run it once, "
    "or load its weights, before the export"
)


def refuse_uninitialised(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise `CaptureFailed` with the name of the first of `tensors` that has no values yet."""
    for name, tensor in tensors:
        if is_lazy(tensor):
            raise CaptureFailed(f"{name} {_ADVICE}")


@contextmanager
def without_initialisation() -> Iterator[None]:
    """No layer can take random weights meanwhile, not even one that is no submodule of the policy."""
    mixin: Any = parameter.UninitializedTensorMixin  # type: ignore[attr-defined]  # the stubs lack it
    materialize = mixin.materialize

    def refuse(_: Any, shape: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise CaptureFailed(f"a parameter of shape {tuple(shape)} {_ADVICE}")

    mixin.materialize = refuse
    try:
        yield
    finally:
        mixin.materialize = materialize
