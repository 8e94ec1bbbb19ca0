"""TorchRL's transforms in a policy, as in ``TensorDictSequential(env.transform[:-1], policy)``.

An environment runs its transforms on each observation, and some of them have memory. Here each transform becomes a step
of the program:

* One whose result no later module reads is left out: only training needs it (counters, rewards, done flags).
* One that computes its result from the observation alone is run as it is.
* One that remembers has state: `actserve_export.capture.episode`.

`TRANSFORMS` says what each class becomes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.envs import transforms as torchrl
from torchrl.envs.transforms.transforms import FlattenTensorDict, _CallableTransform, _InvertTransform

from actserve.core.errors import CaptureFailed
from actserve_export.capture.episode import EpisodeStart, MaxOfFrames, Primed, RewardSoFar, StepCount
from actserve_export.capture.step_io import StepIO
from actserve_export.capture.steps import FixedVecNorm, FrameStack, LeftOut, TransformStep
from actserve_export.sources.keys import Key


class Elementwise(TransformStep):
    """Each of the `out_keys` is computed from one of the `in_keys`. A key that is missing is skipped."""

    def __init__(self, original: Any, io: StepIO) -> None:
        super().__init__(original, io)
        self.original = _for_batches(original)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        for in_key, out_key in zip(self.in_keys, self.out_keys, strict=True):
            value = tensordict.get(in_key, None)
            if value is not None:
                tensordict.set(out_key, self.apply(value))
        return tensordict

    def apply(self, value: Tensor) -> Tensor:
        original: Any = self.original
        result: Tensor = original._apply_transform(value)
        return result


class Renamed(Elementwise):
    """`RenameTransform`: the value under its new key, too. `DeviceCastTransform`: the CPU is the only device."""

    def apply(self, value: Tensor) -> Tensor:
        return value


class Cast(Elementwise):
    """`DTypeCastTransform`, `DoubleToFloat`. Without keys: every tensor of `dtype_in`."""

    def __init__(self, original: Any, io: StepIO) -> None:
        self.every = original.in_keys is None
        super().__init__(original, io)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        original: Any = self.original
        if self.every:
            for key, value in list(tensordict.items(True, True)):
                if value.dtype == original.dtype_in:
                    tensordict.set(key, self.apply(value))
        return super().forward(tensordict)


class Whole(TransformStep):
    """A transform that reads and writes the tensordict itself."""

    def __init__(self, original: Any, io: StepIO) -> None:
        super().__init__(original, io)
        self.in_keys += [original.ref_key] if isinstance(original, torchrl.ExpandAs) else []
        self.original = _for_batches(original)

    def keep(self, read: set[Any]) -> None:
        if self.out_keys and not read & set(self.out_keys):
            self.in_keys, self.out_keys, self.original = [], [], None

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        original: Any = self.original
        if original is None:
            return tensordict
        own = type(original).forward is not torchrl.Transform.forward
        result: TensorDictBase = original(tensordict) if own else original._call(tensordict)
        return result


class Function(Whole):
    """A function of the tensordict, as in ``Compose(lambda td: ...)``. It has no keys until `find_keys` finds them."""

    def keep(self, read: set[Any]) -> None:
        pass


class Inverse(TransformStep):
    """A transform applied backwards, from the policy's action to the environment's."""

    def __init__(self, original: Any, io: StepIO) -> None:
        super().__init__(original, io)
        self.in_keys, self.out_keys = list(original.out_keys_inv), list(original.in_keys_inv)
        self.original = _for_batches(original, attached=True)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        original: Any = self.original
        if isinstance(original, torchrl.DiscreteActionProjection):
            return self._project(tensordict, original.num_actions_effective)
        result: TensorDictBase = original._inv_call(tensordict)
        return result

    def _project(self, tensordict: TensorDictBase, count: int) -> TensorDictBase:
        """An action that the environment does not have becomes one of its `count` own, at random."""
        for in_key, out_key in zip(self.in_keys, self.out_keys, strict=True):
            chosen = tensordict.get(in_key).long().argmax(-1)
            noise = self.io.noise("uniform", tuple(int(extent) for extent in chosen.shape[1:]))
            drawn = (noise * count).floor().long()
            tensordict.set(out_key, nn.functional.one_hot(chosen.where(chosen < count, drawn), count))
        return tensordict


def _for_batches(original: Any, attached: bool = False) -> Any:
    """`original`, changed so that it runs on batches and in a program.

    Axes that count from the front count from behind the batch. `ObservationNorm` and `RewardScaling` have a tensor as a
    flag, on which a program cannot branch. Unless `attached`, it forgets its environment.
    """
    if isinstance(original, torchrl.ObservationNorm) and not original.initialized:
        raise CaptureFailed("ObservationNorm has no statistics: call .init_stats() or give loc and scale")
    flag = original._buffers.pop("standard_normal", None)
    if flag is not None:
        original.standard_normal = bool(flag)
    for name in {
        torchrl.FlattenObservation: ("_first_dim", "_last_dim"),
        torchrl.UnsqueezeTransform: ("_dim",),
        torchrl.SqueezeTransform: ("_dim",),
        torchrl.Stack: ("dim",),
        torchrl.CatTensors: ("dim",),
    }.get(type(original), ()):
        if (axis := getattr(original, name)) >= 0:
            setattr(original, name, axis + 1)
    if not attached:
        original.reset_parent()
    return original


def _generic(original: Any, io: StepIO) -> nn.Module:
    """The step for a transform of any other class."""
    kind = type(original)
    generic = torchrl.Transform.forward, torchrl.Transform._call
    return (Elementwise if kind.forward in generic and kind._call in generic else Whole)(original, io)


def _cat_frames(original: Any, io: StepIO) -> nn.Module:
    if original.future or original.mask_key is not None:
        raise CaptureFailed("CatFrames with future or mask_key needs whole trajectories: a policy sees one observation")
    return LeftOut(original, io) if original.as_inverse else FrameStack(original, io)


def _refused(advice: str) -> Callable[[Any, StepIO], nn.Module]:
    def refuse(original: Any, _: StepIO) -> nn.Module:
        raise CaptureFailed(f"{type(original).__name__} {advice}")

    return refuse


_TEXT = "reads text, and a program takes tensors: run it in the client, and export the policy behind it"
_BUFFER = "is for replay buffers: leave it out of the exported policy"
_SWITCH = (
    "has another policy act in some states: choose between the two policies with torch.where in one module, and "
    "export that"
)
TRANSFORMS: dict[type, Callable[[Any, StepIO], nn.Module]] = {  # the first that a transform is an instance of
    **dict.fromkeys((torchrl.Tokenizer, torchrl.Hash), _refused(_TEXT)),
    **dict.fromkeys((torchrl.BurnInTransform, torchrl.RandomCropTensorDict, FlattenTensorDict), _refused(_BUFFER)),
    torchrl.ConditionalPolicySwitch: _refused(_SWITCH),
    **dict.fromkeys(
        (
            *(torchrl.TerminateTransform, torchrl.RandomTruncationTransform, torchrl.Timer, torchrl.TrajCounter),
            *(torchrl.EndOfLifeTransform, torchrl.AutoResetTransform, torchrl.VecGymEnvTransform),
            *(torchrl.ConditionalSkip, torchrl.FrameSkipTransform, torchrl.NoopResetEnv, torchrl.MultiAction),
            *(torchrl.ActionMask, torchrl.FiniteTensorDictCheck, torchrl.PinMemoryTransform),
            *(torchrl.RemoveEmptySpecs, torchrl.SelectTransform, torchrl.ExcludeTransform),
            *(torchrl.NextObservationDelta, torchrl.RNDTransform, torchrl.ActionChunkTransform),
            *(torchrl.PolicyAgeFilter, torchrl.MultiStepTransform, torchrl.NextStateReconstructor),
            *(torchrl.Reward2GoTransform, torchrl.VIPRewardTransform),
        ),
        LeftOut,
    ),
    torchrl.StepCounter: StepCount,
    torchrl.InitTracker: EpisodeStart,
    torchrl.TensorDictPrimer: Primed,
    torchrl.TargetReturn: RewardSoFar,
    torchrl.RewardSum: RewardSoFar,
    torchrl.TimeMaxPool: MaxOfFrames,
    torchrl.CatFrames: _cat_frames,
    torchrl.VecNorm: FixedVecNorm,
    torchrl.VecNormV2: FixedVecNorm,
    torchrl.DTypeCastTransform: Cast,
    torchrl.RenameTransform: Renamed,
    torchrl.DeviceCastTransform: Renamed,
    _InvertTransform: lambda original, io: Inverse(original.transform, io),
    _CallableTransform: Function,
    torchrl.Transform: _generic,
}


def connect(steps: list[Any], example: TensorDictBase, io: StepIO, outputs: Collection[Key]) -> TensorDictBase:
    """Leave out the transforms of a policy's `steps` whose results no later step reads, except `outputs`.

    Returns `example`, one item, with the inputs that transforms read and that it may lack.

    Transforms behind the last other module compute the policy's results, and stay.
    """
    others = [index for index, step in enumerate(steps) if not isinstance(step, TransformStep)]
    if not others:
        return example
    front, policy = steps[: others[-1]], [steps[index] for index in others]
    find_keys(front, example, io)
    given = set(example.keys(include_nested=True, leaves_only=True))
    carried = {key for step in policy for key in step.out_keys}
    read: set[Any] = {*steps[others[-1]].in_keys, *outputs}
    completed = example
    for step in reversed(front):
        if isinstance(step, TransformStep):
            step.keep(read)
        if isinstance(step, Primed):
            step.choose(given, carried)
        for key, value in getattr(step, "examples", {}).items():
            completed = completed if key in given else completed.copy().set(key, value)
        read = (read - set(step.out_keys)) | set(step.in_keys)
    return completed


def find_keys(steps: list[Any], example: TensorDictBase, io: StepIO) -> None:
    """Find out which keys functions among the `steps` read and write, by running them on `example`."""
    if not any(isinstance(step, Function) for step in steps):
        return
    io.begin(1, None)
    tensordict = example.unsqueeze(0).apply(lambda x: x + x.new_ones(()) if x.is_floating_point() else x)
    try:
        for step in steps:
            if isinstance(step, Function):
                step.in_keys, step.out_keys = _found_keys(step, tensordict)
            tensordict = step(tensordict.clone())
    except Exception:  # the user's own code: the first run of the policy reports it
        return
    finally:
        io.clear()


def _found_keys(function: Function, tensordict: TensorDictBase) -> tuple[list[Any], list[Any]]:
    """(keys read, keys written). A key is read if the function fails without it, or writes something else."""
    before = dict(tensordict.items(True, True))
    result = function(tensordict.clone())
    if result.batch_size != tensordict.batch_size:  # it reshapes everything
        return [], []
    written = {key: value for key, value in result.items(True, True) if not _same(before.get(key), value)}
    reads = []
    for key in before:
        try:
            without = dict(function(tensordict.clone().exclude(key)).items(True, True))
        except Exception:  # the user's own code, which lacks an input
            reads.append(key)
            continue
        if not all(_same(without.get(name), value) for name, value in written.items()):
            reads.append(key)
    return reads, list(written)


def _same(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.shape == other.shape and one.dtype == other.dtype and bool((one == other).all())
