"""LimitedPolicy: a captured policy that keeps to its limits, as every program that is built from it does."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from actserve.core.errors import UsageError
from actserve_export.capture.limits.signature import limited_signature
from actserve_export.capture.limits.step import LimitedStep
from actserve_export.capture.tensordict_policy import TRACED_BATCH, TracedPolicy
from actserve_export.capture.trace import trace
from actserve_export.sources.interfaces import CapturedPolicy
from actserve_export.sources.limits_file import LimitsFile


@dataclass(frozen=True)
class LimitedPolicy(TracedPolicy):
    """`own` is the policy without limits."""

    own: TracedPolicy | None = None

    @property
    def unlimited(self) -> TracedPolicy:
        assert self.own is not None
        return self.own


def limit(captured: CapturedPolicy, file: LimitsFile) -> LimitedPolicy:
    """`captured` with limits. Raises `UsageError` for limits that do not fit it, and `CaptureFailed`."""
    if not isinstance(captured, TracedPolicy):
        raise UsageError(
            "limits are nodes that are traced together with a policy of PyTorch; an .onnx file is exported as it is: "
            "export the policy that the file was made from, or limit the actions in the file"
        )
    signature = limited_signature(captured.signature, file)
    program = captured.program
    with torch.no_grad():
        traced = trace(
            lambda: LimitedStep(program.module(check_guards=False), captured.signature, signature),
            signature,
            TRACED_BATCH if signature.max_batch > 1 else 1,
        )
    reference = LimitedStep(captured.reference, captured.signature, signature)
    own = {field.name: getattr(captured, field.name) for field in fields(TracedPolicy)}
    return LimitedPolicy(**{**own, "program": traced, "reference": reference, "signature": signature}, own=captured)


def without_limits(captured: CapturedPolicy) -> CapturedPolicy:
    """The policy itself, without the limits that it may have."""
    return captured.unlimited if isinstance(captured, LimitedPolicy) else captured
