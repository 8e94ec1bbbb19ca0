"""The file of `actserve export --limits`. `actserve_export.capture.limits` applies it to a signature."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from actserve.core.errors import UsageError
from actserve.core.imports import import_extra
from actserve.core.signature import Array

HOLD = "hold"
OBSERVATIONS = "observations"  # the key that is no output
LARGEST = 2.0**53  # of whole numbers: JSON and float64 hold each up to there


def _numbers(value: Any) -> Array:
    """A number, or lists of numbers, as float64. Raises `ValueError`."""
    if isinstance(value, np.ndarray):
        return value
    flat = _flat(value)
    try:
        array = np.array(value, np.float64)
    except (ValueError, TypeError):
        array = None
    if not flat or array is None:
        raise ValueError(f"expected a number or a list of numbers; got {value!r}"[:200])
    if not np.isfinite(array).all():
        raise ValueError(f"expected finite numbers; got {value!r}"[:200])
    return array


def _flat(value: Any) -> list[Any]:
    """The leaves of nested lists; none if one of them is no number. YAML takes 1e-3 for text, and `yes` for a bool."""
    if isinstance(value, (list, tuple)):
        parts = [_flat(each) for each in value]
        return [leaf for part in parts for leaf in part] if all(parts) else []
    return [] if isinstance(value, bool) or not isinstance(value, (int, float, str)) else [value]


def _fallback(value: Any) -> Any:
    return value if value == HOLD else _numbers(value)


Numbers = Annotated[Any, BeforeValidator(_numbers)]
Choices = Annotated[list[Annotated[int, Field(strict=True, ge=0, le=LARGEST)]], Field(min_length=1)]


class OutputSection(BaseModel):
    """The limits of one output, as they were written: float64 arrays of any shape."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    low: Numbers | None = None
    high: Numbers | None = None
    change: Numbers | None = None
    start: Numbers | None = None
    allowed: Choices | None = None
    forbidden: Choices | None = None
    dwell: Annotated[int, Field(strict=True, ge=1, le=LARGEST)] | None = None
    fallback: Annotated[Any, BeforeValidator(_fallback)]


class LimitsFile(BaseModel):
    """Sections by output, and `observations: finite`."""

    model_config = ConfigDict(frozen=True)

    outputs: dict[str, OutputSection]
    finite_observations: bool = False


def read_limits(path: Path) -> LimitsFile:
    """Read a YAML file. Raises `UsageError`, which names the file and the entry."""
    yaml = import_extra("export", "yaml")
    try:
        document = yaml.load(path.read_text(), _loader(yaml))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from error
    return parse_limits(document, path.name)


def parse_limits(document: Any, where: str = "limits") -> LimitsFile:
    """The content of such a file, as Python's dicts and lists. Raises `UsageError`; `where` begins its message."""
    if not isinstance(document, Mapping) or not document.keys() - {OBSERVATIONS}:
        raise UsageError(
            f"{where}: expected limits by the name of an output, such as action: {{low: -1, high: 1, fallback: hold}}; "
            f"got {document!r}"[:300]
        )
    sections = dict(document)
    observations = sections.pop(OBSERVATIONS, None)
    if observations not in (None, "finite"):
        raise UsageError(f"{where}: {OBSERVATIONS}: expected finite; got {observations!r}"[:200])
    try:
        outputs = TypeAdapter(dict[str, OutputSection]).validate_python(sections)
    except ValidationError as error:
        raise UsageError(f"{where}: {_first(error)}") from None
    return LimitsFile(outputs=outputs, finite_observations=observations is not None)


def _first(error: ValidationError) -> str:
    """The first mistake: where it is, what was expected and what came."""
    found = error.errors(include_url=False)[0]
    spot = ".".join(str(part) for part in found["loc"] if part != "[key]")
    known = ", ".join(OutputSection.model_fields)
    if found["type"] == "extra_forbidden":
        return f"{spot}: unknown; expected some of {known}"
    if found["type"] == "missing":
        return f"{spot}: expected hold or numbers: the action to take instead of one that is not finite"
    if found["type"] == "model_type":
        return f"{spot}: expected some of {known}; got {found['input']!r}"[:300]
    message = found["msg"].removeprefix("Value error, ")
    return f"{spot}: {message}" + ("" if "; got" in message else f"; got {found['input']!r}"[:200])


def _loader(yaml: Any) -> Any:
    """A safe loader that refuses a key that comes twice, where YAML's own takes the last one."""

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                problem = f"{key!r} comes twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.value[index][0].start_mark)
        found: dict[Any, Any] = yaml.SafeLoader.construct_mapping(loader, node, deep=True)
        return found

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    return Loader
