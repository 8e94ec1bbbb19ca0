"""The target on the command line -> a source: a known policy, a ``module:factory``, or a file."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from actserve.core.errors import CaptureFailed, UsageError
from actserve.core.signature import Array
from actserve_export.programs.reasons import place_of
from actserve_export.sources.interfaces import ExportSource
from actserve_export.sources.keys import key_name
from actserve_export.sources.modules import from_module
from actserve_export.sources.onnx_source import OnnxSource
from actserve_export.sources.policy_source import PolicySource
from actserve_export.training import atari
from actserve_export.training.known import FILES, find_policy, locate


def load(target: str, checkpoint: Path | None = None) -> tuple[str, PolicySource]:
    """`find_source` for a target that must be a policy of TorchRL or PyTorch. Raises `CaptureFailed` for an `.onnx`."""
    name, source = find_source(target, checkpoint)
    if not isinstance(source, PolicySource):
        raise CaptureFailed(f"{target}: expected a policy; got a {type(source).__name__}")
    return name, source


def playing(source: ExportSource, game: str) -> ExportSource:
    """`source` as a policy for `game`, the name of an ALE ROM. The screen is its only observation that is an image.

    Raises `UsageError`.
    """
    world = atari.environment(game)
    if not isinstance(source, PolicySource):
        raise UsageError("--game is for policies of TorchRL and PyTorch")
    entries = source.example.items(include_nested=True, leaves_only=True)
    screens = [key_name(key) for key, value in entries if value.dtype == torch.uint8 and value.ndim == 3]
    if len(screens) != 1:
        raise UsageError(f"expected one observation of a screen, uint8 (height, width, 3); got {len(screens)}")
    return replace(source, environment=replace(world, screen=screens[0]))


def find_source(
    target: str, checkpoint: Path | None = None, action: str | None = None, **of_file: Any
) -> tuple[str, ExportSource]:
    """(artifact name, source) for a known policy's name, a ``module:factory``, or a file (`.zip` of SB3, `.onnx`).

    `checkpoint` has the weights of a policy. `action` says what the output of a plain module or an `.onnx` file is.
    `of_file` are attributes of an `OnnxSource`, such as `state`.
    Raises `UsageError` for a target that cannot be found, and `CaptureFailed` for another result of a factory.
    """
    path = locate(target, checkpoint)
    sys.path.insert(0, str(Path.cwd()))  # the user's modules are in the current folder
    try:
        name, made = _make_from_file(Path(path)) if Path(path).suffix in FILES else _make(target, path)
    finally:
        sys.path.pop(0)
    source = _as_source(target, made, action)
    if of_file:
        if not isinstance(source, OnnxSource):
            raise UsageError(f"--output, --state, --constant and --batch-axis are for .onnx files; got {target}")
        source = replace(source, **of_file)
    if checkpoint is not None:
        _restore(source, checkpoint)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), source


def _make_from_file(path: Path) -> tuple[str, object]:
    try:
        return path.stem, resolve_name(FILES[path.suffix])(path)
    except ModuleNotFoundError as error:
        raise UsageError(f'{path.name} needs {error.name}; try: pip install "actserve[sb3]"') from error


def _make(target: str, path: str) -> tuple[str, object]:
    known = find_policy(target)
    try:
        factory = resolve_name(path)
    except Exception as error:
        is_file = path.partition(":")[0].endswith(".py")
        advice = ": leave out .py" if is_file else _place(error)
        raise UsageError(f"{target!r} cannot be imported: {_reason(error)}{advice}") from error
    except SystemExit as error:  # not ours: we would end without a word
        raise UsageError(f"{target!r} cannot be imported: it ends the program, with {error.code!r}") from error
    if isinstance(factory, nn.Module) or not callable(factory):
        return target if known else path.partition(":")[2], factory
    try:
        made = factory(*(known.arguments if known else ()))
    except (Exception, SystemExit) as error:  # the user's own code
        raise UsageError(f"{target} raised {_reason(error)}{_place(error)}{_needs(factory)}") from error
    return target if known else path.partition(":")[2], made


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {text}"


def _place(error: BaseException) -> str:
    """The file and line of an error in the user's code, for a message."""
    if isinstance(error, SyntaxError) and error.filename:
        return "" if "line" in str(error) else f" ({Path(error.filename).name})"
    return place_of(error)


def _needs(factory: Any) -> str:
    """If a factory needs arguments: the end of an error that says how to change it. Otherwise ""."""
    try:
        inspect.signature(factory).bind()
    except TypeError:
        return ": it is called without arguments; give them defaults"
    except ValueError:  # no signature is known
        pass
    return ""


def _as_source(target: str, made: Any, action: str | None) -> PolicySource | OnnxSource:
    if isinstance(made, OnnxSource):
        return made if action is None else replace(made, action=action)
    policy, example = made if isinstance(made, tuple) and len(made) == 2 else (None, None)
    of_keys = isinstance(getattr(policy, "_orig_mod", policy), TensorDictModuleBase)  # torch.compile wraps a module
    if isinstance(policy, nn.Module) and not of_keys:
        if action is None:
            raise UsageError(f"{target} gives a plain module: say what its output is, with --action argmax or identity")
        return from_module(policy, example, action)
    if isinstance(made, PolicySource) or (of_keys and isinstance(example, (TensorDictBase, dict))):
        if action is not None:
            raise UsageError(f"--action is for plain modules and .onnx files; {target} says itself what its action is")
        return made if isinstance(made, PolicySource) else PolicySource(policy, example)
    raise CaptureFailed(
        f"{target} must return (tensordict module, TensorDict), (module, example tensor or dict of them), "
        f"a PolicySource or an OnnxSource; got {_described(made)}"
    )


def _described(made: Any) -> str:
    if isinstance(made, tuple):
        return f"({', '.join(map(_described, made))})"
    if isinstance(made, type):
        return f"the class {made.__name__}, not an instance of it"
    if isinstance(made, nn.Module):
        return f"a module ({type(made).__name__})"
    return type(made).__name__ if made is not None else "None: does it lack a return?"


def _restore(source: PolicySource | OnnxSource, checkpoint: Path) -> None:
    if isinstance(source, OnnxSource):
        raise UsageError("--checkpoint is for policies of PyTorch; an .onnx file has its weights")
    try:
        weights = load_file(checkpoint)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{checkpoint} is not a safetensors file that can be read: {error}") from None
    try:
        (source.weights or source.policy).load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(f"{checkpoint} does not fit the policy: {error}") from None


def actor(target: str) -> Callable[[Array], int]:
    """The policy as TorchRL runs it, for comparisons: observation -> action.

    Call it with the observations of one episode, in order, each without a batch axis. It carries the policy's state.
    """
    _, source = load(target)
    torch.set_num_threads(1)
    (name,) = (key for key in source.policy.in_keys if key not in _carried(source))
    carried = source.example.exclude(name).set("is_init", torch.ones(1, dtype=torch.bool))

    def act(observation: Array) -> int:
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            seen = source.policy(carried.clone().set(name, torch.from_numpy(observation)))
            if "next" in seen:
                carried.update(seen["next"]).set("is_init", torch.zeros(1, dtype=torch.bool))
            return int(seen[source.outputs[0]])

    return act


def _carried(source: PolicySource) -> set[str]:
    """The inputs that a policy writes itself, and the reset flag."""
    return {"is_init"} | {key[1] for key in source.policy.out_keys if isinstance(key, tuple)}
