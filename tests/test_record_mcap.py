"""`actserve record export --format mcap`, read by the reader of the mcap library."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mcap.reader import make_reader
from mcap_protobuf.decoder import DecoderFactory
from PIL import Image

from actserve.core.signature import Array, TensorSpec
from tests.command_line import actserve
from tests.recorded_episodes import BEGUN_S, PERIOD_S, ROBOT, Recorded, record_episodes

TOPICS = {
    "/observation/observation_images_top",
    "/observation/observation_images_wrist",
    "/observation/observation_state",
    "/observation/gripper",
    "/output/action",
    "/output/value",
    "/step",
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Recorded], list[dict[str, list[Any]]]]:
    """The episodes, and of each file the messages by topic: (time in ns, sequence, decoded message)."""
    folder = tmp_path_factory.mktemp("mcap")
    first, last = record_episodes(folder / "recording", lengths=(4, 3))
    done = actserve("record", "export", str(folder / "recording"), str(folder / "out"), "--format", "mcap")
    assert done.stdout.startswith("2 trajectories of 7 steps")
    files = [read(path) for path in sorted((folder / "out").iterdir())]
    return [last, first], files  # the shorter one is complete first


def read(path: Path) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    with path.open("rb") as stream:
        reader = make_reader(stream, decoder_factories=[DecoderFactory()])
        (metadata,) = reader.iter_metadata()
        assert (metadata.name, metadata.metadata["policy"]) == ("actserve", "robot")
        for schema, channel, message in reader.iter_messages():
            assert schema is not None
            if channel.message_encoding == "json":
                assert schema.encoding == "jsonschema"
                decoded = json.loads(message.data)
                assert decoded.keys() <= json.loads(schema.data)["properties"].keys()
            else:
                assert schema.name == "foxglove.CompressedImage"
                decoder = DecoderFactory().decoder_for(channel.message_encoding, schema)
                assert decoder is not None
                decoded = decoder(message.data)
            found.setdefault(channel.topic, []).append((message.log_time, message.sequence, decoded))
    return found


def pixels(message: Any) -> Array:
    assert message.format == "png"
    return np.asarray(Image.open(io.BytesIO(message.data)))


def test_the_reader_finds_every_step(exported: Any) -> None:
    for episode, file in zip(*exported, strict=True):
        assert file.keys() == TOPICS
        times = [round((BEGUN_S + k * PERIOD_S) * 1e6) * 1000 for k in range(len(episode.steps))]
        for messages in file.values():
            assert [number for _, number, _ in messages] == list(range(1, len(episode.steps) + 1))
            np.testing.assert_allclose([time for time, _, _ in messages], times, rtol=0, atol=2000)
        steps = [message for _, _, message in file["/step"]]
        assert [step["reward"] for step in steps] == episode.rewards
        assert len({step["episode"] for step in steps}) == 1
    assert [[step["done"] for _, _, step in file["/step"]] for file in exported[1]] == [
        [False] * 3,
        [False] * 3 + [True],
    ]


def test_images_are_exact_and_numbers_too(exported: Any) -> None:
    for episode, file in zip(*exported, strict=True):
        for k, step in enumerate(episode.steps):
            (_, _, top) = file["/observation/observation_images_top"][k]
            np.testing.assert_array_equal(pixels(top), step["observation_images_top"][0])
            assert top.timestamp.ToNanoseconds() == file["/step"][k][0]
            (_, _, wrist) = file["/observation/observation_images_wrist"][k]
            scaled = np.rint(np.moveaxis(step["observation_images_wrist"][0], 0, -1) * 255)
            np.testing.assert_array_equal(pixels(wrist), scaled)
            for topic in ("/observation/observation_state", "/output/action", "/output/value", "/observation/gripper"):
                name = topic.rpartition("/")[2]
                assert file[topic][k][2]["value"] == step[name][0].tolist()


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    endless = replace(ROBOT, observations=(TensorSpec("x", "float32", (2,)),))
    record_episodes(tmp_path / "recording", endless, lengths=(2,), rewards=False, values={"x": [np.inf, 1.0]})
    actserve("record", "export", str(tmp_path / "recording"), str(tmp_path / "out"), "--format", "mcap")
    file = read(tmp_path / "out" / "000000.mcap")
    assert [message["value"] for _, _, message in file["/observation/x"]] == [[None, 1.0]] * 2
    assert [message["reward"] for _, _, message in file["/step"]] == [None] * 2


def test_floats_that_are_no_pixels_are_refused(tmp_path: Path) -> None:
    camera = replace(ROBOT, observations=(TensorSpec("camera", "float32", (3, 9, 9)),))
    record_episodes(tmp_path / "recording", camera, lengths=(2,), values={"camera": np.full((3, 9, 9), 2.0)})
    done = actserve("record", "export", str(tmp_path / "recording"), str(tmp_path / "out"), "--format", "mcap")
    assert done.returncode == 2
    assert "expected the pixels of camera in 0 to 1; got 2 to 2" in " ".join(done.stderr.split())
