"""The library of the bundle for C++, with a program that returns its inputs: every dtype, and the noise."""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actserve.bundles.cpp import header, literals, tables
from actserve.core.completion import complete, draw_noise, step_seed
from actserve.core.errors import InvalidRequest
from actserve.core.signature import (
    IS_INIT,
    Array,
    Arrays,
    Distribution,
    DType,
    Noise,
    Parameter,
    Signature,
    State,
    TensorSpec,
)
from actserve.store.artifact import FileRecord, Program
from tests.bundled import artifact_of
from tests.bundled_cpp import FILES, RANDOM, RESET, Driver, Refused, driven, needs_compiler, run

pytestmark = needs_compiler

DISTRIBUTIONS: tuple[Distribution, ...] = ("uniform", "normal", "gumbel", "exponential")
DTYPES: tuple[DType, ...] = (
    *("uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "bool"),
)  # fmt: skip
SOURCES = ("bfloat16", "files", "noise", "policy", "sha256", "validation")
STATE = (
    State(TensorSpec("memory", "float32", (2, 3)), "next_memory", tuple(map(float, range(6)))),
    State(TensorSpec("halves", "bfloat16", (2,)), "next_halves", 1e4),
    State(TensorSpec("age", "int64", ()), "next_age", -3.0),
)
DRAWS = 1_000_000
SEED = 7  # of the episode, in echo_program.cpp


def echoing() -> Signature:
    """The outputs are the inputs."""
    observations = (
        *(TensorSpec(f"a {dtype}", dtype, (3,)) for dtype in DTYPES),
        *(TensorSpec(f"bounded {dtype}", dtype, (), 0, 1) for dtype in DTYPES[:-1]),
        TensorSpec('each "\\\n', "float32", (2, 2), (0.0, None, -1.5, 0.0), 3.0),
        TensorSpec("int", "uint8", (2, 0)),
        *(TensorSpec(name, "float32", ()) for name in ("source", "std", "float16", "NULL", "unix", "")),
    )
    signature = Signature(
        observations=observations,
        outputs=(),
        max_batch=16,
        is_init=True,
        exploration=("deterministic", "random"),
        parameters=(Parameter("epsilon", 0.1, 0.0, 1.0), Parameter("float", 3.0, -1.0, None)),
        noise=tuple(Noise(TensorSpec(name, "float32", (3,)), name, name == "normal") for name in DISTRIBUTIONS),
    )
    with_state = replace(signature, state=STATE)
    return replace(with_state, outputs=tuple(replace(spec, name=f"{spec.name}'") for spec in with_state.inputs))


def stateless() -> Signature:
    age = replace(STATE[2].spec, name="age")  # an observation here
    signature = replace(echoing(), observations=(*echoing().observations, age), state=(), is_init=False)
    return replace(signature, outputs=tuple(replace(spec, name=f"{spec.name}'") for spec in signature.inputs))


def compiled(signature: Signature, folder: Path, *flags: str) -> Path:
    """An executable that acts in `folder` with the library and echo_program.cpp."""
    (folder / "policy.onnx").write_bytes(b"a program")
    files = {"policy.onnx": FileRecord(hashlib.sha256(b"a program").hexdigest(), 9)}
    manifest = replace(
        artifact_of("pong").manifest, signature=signature, programs={"onnx": Program("policy.onnx")}, files=files
    )
    (folder / "actserve").mkdir()
    (folder / "actserve" / "signature.h").write_text(header.signature(manifest, "onnx"))
    (folder / "ziggurat.h").write_text(tables.header())
    source = FILES / "files"
    sources = [str(source / "src" / f"{name}.cpp") for name in SOURCES]
    sources += [str(source / "program" / "frames.cpp"), str(Path(__file__).with_name("echo_program.cpp"))]
    includes = [f"-I{path}" for path in (folder, source / "include", source / "src", source / "program")]
    run(
        "c++",
        "-std=c++17",
        "-ffp-contract=off",
        *flags,
        "-Wall",
        "-Wextra",
        "-Werror",
        *includes,
        *sources,
        "-o",
        str(folder / "policy"),
    )
    return folder / "policy"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(echoing(), tmp_path_factory.mktemp("echo"), "-fsanitize=undefined,address", "-fno-sanitize-recover")


@pytest.fixture
def policy(program: Path) -> Iterator[Driver]:
    with driven(program, echoing(), str(program.parent)) as driver:
        yield driver


def sampled(signature: Signature, size: int) -> Arrays:
    """Observations, (size, *shape) each."""
    rng = np.random.default_rng(size)
    return {spec.name: spec.sample(rng, size) for spec in signature.observations}


def same(found: Arrays, expected: Arrays, signature: Signature) -> None:
    """Compare the inputs of the program with those of the service, bit for bit."""
    for spec in signature.inputs:
        array = spec.from_wire(spec.to_wire(expected[spec.name]))
        np.testing.assert_array_equal(found[f"{spec.name}'"], array, spec.name)


def test_every_input_is_that_of_a_session(policy: Driver) -> None:
    signature = echoing()
    state: Arrays = {}
    for step in range(1, 9):
        random, anew = step % 2 == 0, step == 5
        tensors = sampled(signature, 1)
        given = {IS_INIT.name: np.ones(1, bool)} if anew else state
        seed = step_seed(SEED, step)
        inputs = complete(signature, tensors | given, 1, "random" if random else "deterministic", seed).inputs
        found = policy.step({name: array[0] for name, array in tensors.items()}, RANDOM * random | RESET * anew)
        same(found, {name: array[0] for name, array in inputs.items()}, signature)
        state = {each.spec.name: rounded(each.spec, inputs[each.spec.name] + 1) for each in signature.state}
    assert not inputs["explore"].any() or inputs["uniform"].any()


def rounded(spec: TensorSpec, array: Array) -> Array:
    return spec.from_wire(spec.to_wire(array.astype(spec.numpy_dtype)))


def test_episodes_of_one_policy_keep_their_own_state(program: Path) -> None:
    assert run(str(program), "--turns", str(program.parent)).split() == ["-3", "-3", "-2", "-1", "-2", "-3", "-1"]


def test_every_input_is_that_of_a_batch(tmp_path: Path) -> None:
    signature = stateless()
    parameters = (0.5, -1.0)
    values = {each.name: value for each, value in zip(signature.parameters, parameters, strict=True)}
    with driven(compiled(signature, tmp_path), signature, str(tmp_path)) as policy:
        for size in (1, 5, 16, 2):
            tensors = sampled(signature, size)
            given = {name: np.full(size, value, np.float32) for name, value in values.items()}
            inputs = complete(signature, tensors | given, size, "random", 2**63 - 1).inputs
            found = policy.step(tensors, RANDOM, seed=2**63 - 1, count=size, parameters=parameters)
            same(found, inputs, signature)
            assert (found["explore'"] == 1).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((f"bounded {dtype}", 2) for dtype in DTYPES[:-1]),
        *((f"bounded {dtype}", -1) for dtype in ("int8", "int16", "int32", "int64", "float16", "bfloat16", "float64")),
        *((f"a {dtype}", np.nan) for dtype in ("float16", "bfloat16", "float32", "float64")),
        ('each "\\\n', -2),
        ('each "\\\n', 3.5),
    ],
)
def test_bad_values_get_the_error_of_the_service(policy: Driver, name: str, value: float) -> None:
    signature = echoing()
    tensors = sampled(signature, 1)
    tensors[name].reshape(-1)[-1] = value
    with pytest.raises(InvalidRequest) as error:
        signature.validate_request(tensors)
    with pytest.raises(Refused, match=f"^{re.escape(error.value.message.removesuffix('.0'))}$"):
        policy.step({name: array[0] for name, array in tensors.items()})


def test_other_booleans_are_refused(policy: Driver) -> None:
    signature = echoing()
    data = bytearray()
    for spec in signature.observations:
        data += bytes([0, 2, 1]) if spec.name == "a bool" else bytes(spec.item_bytes)
    with pytest.raises(Refused, match="a bool: expected bytes of 0 or 1 for bool; got 2"):
        policy.exchange(b"\0" + data)


def test_infinities_are_numbers(policy: Driver) -> None:
    tensors = {name: array[0] for name, array in sampled(echoing(), 1).items()}
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        tensors[f"a {dtype}"][:] = [np.inf, -np.inf, 2.0**-20]
    found = policy.step(tensors)
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        np.testing.assert_array_equal(found[f"a {dtype}'"], tensors[f"a {dtype}"])


def test_names_become_identifiers() -> None:
    names = ["a b", "a.b", "int", "9", "", "ü", "pointers", "a_b_2"]
    assert literals.identifiers(names) == ["a_b", "a_b_2", "int_", "n9", "n", "n_2", "pointers_", "a_b_2_2"]


def test_noise_is_numpys_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "ziggurat.h").write_text(tables.header())
    (tmp_path / "draw.cpp").write_text(
        '#include "noise.h"\n'
        'extern "C" void draw(std::uint64_t seed, std::uint64_t item, int kind, float* values, std::size_t count) {\n'
        "  actserve::Philox(seed, item).fill(static_cast<actserve::Distribution>(kind), values, count);\n}\n"
    )
    source, library = FILES / "files", tmp_path / "draw.so"
    includes = [f"-I{path}" for path in (tmp_path, source / "include", source / "src")]
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", *includes]
    run("c++", *flags, str(tmp_path / "draw.cpp"), str(source / "src" / "noise.cpp"), "-o", str(library))
    draw = ctypes.CDLL(str(library)).draw
    draw.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    for kind, distribution in enumerate(DISTRIBUTIONS):
        noise = Noise(TensorSpec("noise", "float32", (DRAWS,)), distribution)
        found = np.empty(DRAWS, np.float32)
        draw(2**63 - 1 - kind, kind, kind, found.ctypes.data, DRAWS)
        np.testing.assert_array_equal(found, draw_noise((noise,), 2**63 - 1 - kind, 1, kind)["noise"][0])
