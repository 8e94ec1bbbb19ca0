"""Names of a robot's observation -> the inputs of a policy.

Robots' stacks nest their names or join them with `/`, `.` or `_`: `observation/image`, `observation.state`,
`{"observation": {"images": {"top": …}}}`. A name is the input with

1. the same name; else
2. the same name, where `/`, `.` and `_` are equal; else
3. the same end: the end of the name, cut at `/` or `.`, is the input (`observation/image` is `image`), or the name is
   the end of the input, cut anywhere (`image` is `observation_image`).

Names that fit several inputs, and inputs that several names fit, are errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from actserve.core.errors import InvalidTensor, MalformedBody

MAX_NAMES = 256
MAX_DEPTH = 16
_EQUAL = str.maketrans("._", "//")


def flatten(observation: Any) -> dict[str, Any]:
    """Nested dicts -> one dict, whose names are joined with `/`. Raises `MalformedBody`."""
    if not isinstance(observation, dict):
        raise MalformedBody(f"expected an observation, names and values; got {type(observation).__name__}")
    found: dict[str, Any] = {}
    for name, value in _leaves(observation, "", MAX_DEPTH):
        if name in found:
            raise MalformedBody(f"expected each name once; got {name[:80]!r} again")
        if len(found) >= MAX_NAMES:
            raise MalformedBody(f"expected at most {MAX_NAMES} names in an observation; got more")
        found[name] = value
    return found


def _leaves(values: Mapping[Any, Any], prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    if not depth:
        raise MalformedBody(f"expected names nested at most {MAX_DEPTH} deep; got deeper ones")
    for name, value in values.items():
        if not isinstance(name, str):
            raise MalformedBody(f"expected text as a name; got {name!r}"[:200])
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}/", depth - 1)
        else:
            yield prefix + name, value


class NameMap:
    """Maps names to `inputs`. Names that fit none are refused, unless `ignored` has them or a part of them."""

    def __init__(self, inputs: Sequence[str], ignored: Iterable[str] = ()) -> None:
        self._inputs = inputs
        self._ignored = [f"/{name.replace('.', '/')}/" for name in ignored]
        self._last: tuple[tuple[str, ...], dict[str, str]] = ((), {})  # robots send the same names every time

    def __call__(self, names: Iterable[str]) -> dict[str, str]:
        """The input of each name, without the ignored ones. Raises `InvalidTensor`."""
        names = tuple(names)
        if names != self._last[0]:
            self._last = names, self._match(names)
        return self._last[1]

    def _match(self, names: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {name: name for name in names if name in self._inputs}
        for name in names:
            if name not in found and (equal := [known for known in self._inputs if _same(name, known)]):
                found[name] = _only(name, equal)
        free = [known for known in self._inputs if known not in found.values()]
        for name in names:
            if name not in found and not self._ignores(name):
                found[name] = _only(name, _same_end(name, free) or self._unknown(name))
        self._check_once(found)
        return found

    def _ignores(self, name: str) -> bool:
        whole = f"/{name.replace('.', '/')}/"
        return any(ignored in whole for ignored in self._ignored)

    def _unknown(self, name: str) -> list[str]:
        expected = f"one of the inputs {', '.join(self._inputs)}, or `serve --ignore {_last_part(name)}`"
        raise InvalidTensor(name[:80], expected, "a name that the policy lacks")

    @staticmethod
    def _check_once(found: Mapping[str, str]) -> None:
        by_input: dict[str, str] = {}
        for name, known in found.items():
            other = by_input.setdefault(known, name)
            if other != name:
                raise InvalidTensor(known, "one name for this input", f"{other[:80]} and {name[:80]}, which both fit")


def _same(name: str, known: str) -> bool:
    return name.translate(_EQUAL) == known.translate(_EQUAL)


def _same_end(name: str, inputs: Sequence[str]) -> list[str]:
    """The inputs with the same end as `name`, by the longest end of `name` that is an input."""
    for cut in re.finditer(r"[/.]", name):
        if whole := [known for known in inputs if _same(name[cut.end() :], known)]:
            return whole
    end = "/" + name.translate(_EQUAL)
    return [known for known in inputs if known.translate(_EQUAL).endswith(end)]


def _only(name: str, inputs: Sequence[str]) -> str:
    if len(inputs) > 1:
        raise InvalidTensor(name[:80], "the full name of an input", f"one that fits {' and '.join(inputs)}")
    return inputs[0]


def _last_part(name: str) -> str:
    return re.split(r"[/.]", name)[-1][:80]
