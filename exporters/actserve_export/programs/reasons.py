"""Why a policy cannot be exported: what was found, in which line of the user's code, and what to do about it."""

from __future__ import annotations

import linecache
import re
import sysconfig
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from actserve.core.errors import ActserveError, CaptureFailed, one_line

_OURS = Path(__file__).parents[1]
_NOT_THE_USERS = (*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), str(_OURS), "<")
_TERMINAL_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# By what a message of torch or tensordict says: what it means for the author of a policy.
_MEANINGS = (
    (
        r"data-dependent expression|data dependent|DataDependent|_local_scalar_dense",
        "a decision depends on the values of a tensor{place}, and a program cannot branch: choose with torch.where",
    ),
    (
        r"\.numpy\(\) is not supported|numpy\(\) on|tolist\(\)|__array__|to numpy",
        "the policy leaves torch for numpy{place}, and a program cannot: use torch's functions instead",
    ),
    (
        r"batch dimension mismatch.*batch_size=torch\.Size\((?P<batch>.*?)\).*shape=torch\.Size\((?P<shape>.*?)\)",
        "expected a result for each item of a batch of shape {batch}; got the shape {shape}{place}. The batch is the "
        "first axis, also when it is 1: .squeeze() without an axis drops it, .squeeze(-1) does not",
    ),
    (
        r"There are more (out_keys than tensors|tensors \()|lazy representation of a tensordict",
        "the module gives another number of results than it has out_keys{place}: it must return a tensor for each",
    ),
    (
        r"(must|to) have the same dtype|type .* should be the same|expected scalar type \w+ but found",
        "an input of a layer has another dtype than its weights{place}: give the example as the policy gets it in "
        "training, or convert it in the policy",
    ),
    (
        r"Constraints violated|specialized it to be a constant",
        "the policy makes the size of the batch a constant{place}: use x.shape[0] or -1 instead of a number",
    ),
    (
        r"Cannot convert -?oo to int|[Uu]nbacked",
        "the policy takes numbers out of a tensor{place}, and a program cannot: leave out .item(), .tolist() and int()",
    ),
    (
        r"FunctionalTensorMode|inside a function being vmapped",
        "torch.vmap cannot be exported as it is used here{place}: write it with batched operators, such as einsum",
    ),
    (
        r"autograd\.grad|does not require grad|found a fake tensor in the exported program constant",
        "the policy computes gradients when it acts{place}, and a program cannot: write the derivative out, or export "
        "the network without that step",
    ),
    (r"No ONNX function found for <OpOverload\(op='(?P<op>[^']+)'", "ONNX has no operator for torch's {op}{place}"),
)  # fmt: skip


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Foreign errors become a `CaptureFailed` that says what could not be done, and why."""
    try:
        yield
    except ActserveError:
        raise
    except Exception as error:  # torch raises dozens of types, with no common base
        raise CaptureFailed(f"could not {what}: {explain(error)}") from error


def explain(error: Exception) -> str:
    """One line for a foreign error that ended the run or the export of a policy."""
    chain = [each for each in _chain(error) if not str(each).startswith("TensorDictModule failed")] or [error]
    place = next((found for each in reversed(chain) if (found := place_of(each))), "")
    for each in reversed(chain):
        text = _TERMINAL_COLOURS.sub("", f"{type(each).__name__} {each}")
        for pattern, meaning in _MEANINGS:
            if match := re.search(pattern, text, re.DOTALL):
                return meaning.format(place=place, **match.groupdict())
    return _TERMINAL_COLOURS.sub("", one_line(chain[-1])) + place


def place_of(error: BaseException) -> str:
    """The last line of the user's own code that led to `error`, as " (mine.py, line 3: x.numpy())"; "" without one."""
    return _last_of_the_users(
        [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    )


def line_of(node: torch.fx.Node) -> str:
    """The line of the user's own code that a node of a graph comes from, in the same form."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return _last_of_the_users([(file, int(line)) for file, line in frames])


def _last_of_the_users(frames: list[tuple[str, int]]) -> str:
    for file, number in reversed(frames):
        if not file.startswith(_NOT_THE_USERS) and "/actserve/" not in file:
            line = textwrap.shorten(linecache.getline(file, number), 100, placeholder=" …")
            return f" ({Path(file).name}, line {number}{f': {line}' if line else ''})"
    return ""


def _chain(error: Exception) -> Iterator[Exception]:
    """`error`, and what caused it."""
    yield error
    if isinstance(error.__cause__, Exception):
        yield from _chain(error.__cause__)


def refuse_what_has_no_values_or_source(policy: nn.Module) -> None:
    """Raise `CaptureFailed` for TorchScript, whose source is gone, and for parameters without values."""
    for path, module in policy.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureFailed(
                f"{_named(path)} is a TorchScript module, which torch.export cannot read: export the nn.Module that it "
                "was made from, or convert it to an .onnx file"
            )
    for path, tensor in (*policy.named_parameters(), *policy.named_buffers()):
        if tensor.is_meta:
            raise CaptureFailed(f"{_named(path)} is on the device meta, without values: load the weights first")


def _named(path: str) -> str:
    return re.sub(r"^(module(\.|$))+", "", path) or "the policy"
