"""Names of robots' observations, and their values."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from actserve.core.errors import ActserveError, InvalidTensor, MalformedBody
from actserve.core.robot import Robot
from actserve.core.signature import Signature, TensorSpec
from actserve.server.protocols.robots.names import MAX_NAMES, NameMap, flatten
from actserve.server.protocols.robots.roboarena import configuration
from actserve.server.protocols.robots.values import to_tensor
from actserve.wire import as_png

PICTURE = TensorSpec("image", "uint8", (8, 10, 3))
STATE = TensorSpec("state", "float32", (3,))


@pytest.mark.parametrize(
    ("inputs", "names", "expected"),
    [
        (["image", "state"], ["image", "state"], ["image", "state"]),
        (["observation_image"], ["observation/image"], ["observation_image"]),
        (["observation_images_top", "observation_state"], ["observation.images.top", "observation.state"], None),
        (["observation.state"], ["observation/state"], None),
        (["image", "wrist_image"], ["observation/image", "observation/wrist_image"], None),
        (["wrist_image", "image"], ["observation/image", "observation/wrist_image"], ["image", "wrist_image"]),
        (["observation_image", "observation_state"], ["image", "state"], None),
        (["images_top", "top"], ["observation/images/top", "top"], None),
        (["a_b", "a.b"], ["a.b", "a_b"], ["a.b", "a_b"]),
        (["base_0_rgb", "left_wrist_0_rgb"], ["image/base_0_rgb", "image/left_wrist_0_rgb"], None),
    ],
)
def test_a_name_is_the_input_that_it_fits(inputs: list[str], names: list[str], expected: list[str] | None) -> None:
    assert NameMap(inputs)(names) == dict(zip(names, expected or inputs, strict=True))


@pytest.mark.parametrize(
    ("inputs", "names", "error"),
    [
        (["left_image", "right_image"], ["image"], "image: .* fits left_image and right_image"),
        (["a_b", "a.b"], ["a/b"], "a/b: .* fits a_b and a.b"),
        (["image"], ["front/image", "wrist/image"], "image: .* front/image and wrist/image, which both fit"),
        (["state"], ["state", "speed"], "speed: expected one of the inputs state, or `serve --ignore speed`"),
        (["image"], ["observation/wrist_image"], "observation/wrist_image: .*--ignore wrist_image"),
        (["image", "state"], ["image", "wrist/image", "state"], "wrist/image: expected one of the inputs"),
    ],
)
def test_what_fits_nothing_or_several_is_refused_by_name(inputs: list[str], names: list[str], error: str) -> None:
    with pytest.raises(InvalidTensor, match=error):
        NameMap(inputs)(names)


def test_ignored_names_are_left_out_wherever_they_are() -> None:
    map_ = NameMap(["image", "prompt"], ["prompt", "language", "wrist_image"])
    assert map_(["image", "prompt"]) == {"image": "image", "prompt": "prompt"}, "an input is not ignored"
    names = ["image", "language/annotation.human", "observation.language", "observation/wrist_image"]
    assert map_(names) == {"image": "image"}
    with pytest.raises(InvalidTensor, match="prompts"):
        NameMap(["image"], ["prompt"])(["image", "prompts"])


def test_nested_names_become_flat_ones_within_bounds() -> None:
    assert flatten({"observation": {"images": {"top": 1}, "state": 2}, "x": [3]}) == {
        "observation/images/top": 1,
        "observation/state": 2,
        "x": [3],
    }
    nested: dict[str, Any] = {"x": 1}
    for _ in range(40):
        nested = {"x": nested}
    wrong: list[tuple[Any, str]] = [
        (nested, "16 deep"),
        ([1], "got list"),
        ({b"x": 1}, "expected text as a name; got b'x'"),
        ({"a/b": 1, "a": {"b": 2}}, "got 'a/b' again"),
        ({str(i): 1 for i in range(MAX_NAMES + 1)}, "at most 256 names"),
    ]
    for observation, error in wrong:
        with pytest.raises(MalformedBody, match=error):
            flatten(observation)


def encoded(kind: str, shape: tuple[int, ...] = (8, 10, 3), **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.array([1.5, 2, 3], np.float64), [1.5, 2, 3]),
        (np.array([[[1, 2, 3]]], np.float32), [1, 2, 3]),
        (np.array([1, 2, 3], np.float16), [1, 2, 3]),
        ([1, 2.5, 3], [1, 2.5, 3]),
    ],
)
def test_numbers_of_any_precision_become_those_of_the_input(value: Any, expected: list[float]) -> None:
    found = to_tensor(value, STATE)
    assert found.dtype == np.float32
    assert found.tolist() == [expected]
    assert found.flags.writeable


@pytest.mark.parametrize(
    ("value", "spec", "error"),
    [
        (np.zeros(4, np.float32), STATE, r"state: expected float32\[3\]; got float32\[4\]"),
        (np.zeros(3, np.int64), STATE, r"state: expected float32\[3\]; got int64\[3\]"),
        (np.array([1e300, 0, 0]), STATE, "state: expected -3.4.* to 3.4.*; got 0.0 to 1e.300"),
        (np.array([[1, 2, 3], [4, 5, 6]], np.float32), STATE, r"got float32\[2, 3\]"),
        ("pick up the cup", STATE, r"state: expected float32\[3\]; got text"),
        ([1, 2], STATE, r"state: expected float32\[3\]"),
        ([True, 1, 2], STATE, "state: expected numbers"),
        (encoded("PNG"), STATE, "got an image"),
        (np.zeros((16, 20, 3), np.uint8), PICTURE, r"does not say how to resize an image\); got uint8\[16, 20, 3\]"),
        (np.zeros((8, 10, 3), np.float32), PICTURE, r"image: expected uint8\[8, 10, 3\]; got float32"),
        (np.full((8, 10, 3), 300), PICTURE, "image: expected 0 to 255; got 300 to 300"),
        (encoded("JPEG", (16, 20, 3)), PICTURE, "an image of 8 rows and 10 columns; got 16 rows and 20 columns"),
        (encoded("PNG", (16, 20, 3)), PICTURE, "an image of 8 rows and 10 columns; got 16 rows and 20 columns"),
        (encoded("JPEG", progressive=True), PICTURE, "a baseline JPEG"),
        (encoded("JPEG")[:300], PICTURE, "cannot be decoded"),
        (b"GIF89a..", PICTURE, "expected a PNG or a JPEG; got 8 other bytes"),
        (b"\xff\xd8\xff" + bytes(500_000), PICTURE, "at most"),
    ],
)
def test_what_would_have_to_be_converted_is_refused(value: Any, spec: TensorSpec, error: str) -> None:
    with pytest.raises(ActserveError, match=error):
        to_tensor(value, spec)


def test_images_are_decoded_as_bytes_and_as_opencv_has_them() -> None:
    for kind in ("PNG", "JPEG"):
        data = encoded(kind)
        expected = np.array(Image.open(io.BytesIO(data)))
        for value in (data, np.frombuffer(data, np.uint8)):
            np.testing.assert_array_equal(to_tensor(value, PICTURE), expected[None])
    grey = TensorSpec("depth", "uint8", (8, 10, 1))
    assert to_tensor(encoded("JPEG", (8, 10)), grey).shape == (1, 8, 10, 1)
    assert as_png.is_image(grey)


def test_integers_of_any_width_become_those_of_the_input() -> None:
    word = TensorSpec("word", "int32", ())
    assert to_tensor(np.array(7, np.int64), word).tolist() == [7]
    assert to_tensor(7, word).tolist() == [7]
    with pytest.raises(InvalidTensor, match="got 2147483648 to"):
        to_tensor(np.array(2**31), word)


def test_roboarenas_configuration_is_that_of_the_policys_inputs() -> None:
    def signature(*names: str) -> Signature:
        cameras = tuple(TensorSpec(name, "uint8", (180, 320, 3)) for name in names)
        return Signature((*cameras, STATE), (STATE,), 1)

    found = configuration(
        signature("observation/exterior_image_0_left", "observation_exterior_image_1_left", "wrist_image_left"),
        Robot(("arm",), action_units="rad/s"),
    )
    assert found == {
        "image_resolution": (180, 320),
        "needs_wrist_camera": True,
        "n_external_cameras": 2,
        "needs_stereo_camera": False,
        "needs_session_id": False,
        "action_space": "joint_velocity",
    }
    assert configuration(signature("image"), None) is None
