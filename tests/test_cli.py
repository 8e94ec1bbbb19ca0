from __future__ import annotations

import json
from pathlib import Path

import pytest

from actserve.cli.certificate import print_certificate
from actserve.cli.tools.local_service import serve
from actserve.store.local import ModelStore
from tests.command_line import actserve


def test_help_lists_the_commands() -> None:
    result = actserve("--help")
    assert result.returncode == 0
    for command in (
        "train",
        "export",
        "compile",
        "inspect",
        "verify",
        "diff",
        "doctor",
        "serve",
        "play",
        "load",
        "bench",
    ):
        assert command in result.stdout


def test_inspect_and_verify(cart_store: ModelStore) -> None:
    store = ("--store", str(cart_store.root))
    inspected = json.loads(actserve("inspect", "cart", "--json", *store).stdout)
    assert inspected["signature"]["observations"][0]["name"] == "observation"
    shown = actserve("inspect", "cart@1", *store).stdout
    assert "float32[4]" in shown
    assert "requires opset 20" in shown
    assert "chosen actions: 0 in " in shown
    assert "torch.ops.aten.argmax" in actserve("inspect", "cart", "--graph", *store).stdout
    verified = json.loads(actserve("verify", "cart", "--json", *store).stdout)
    assert verified["programs"]["onnx"]["holds"]
    assert verified["programs"]["pt2"]["holds"]


def test_inspect_says_how_a_narrow_program_plays(cart_store: ModelStore, capsys: pytest.CaptureFixture[str]) -> None:
    certificate = cart_store.resolve("cart").manifest.certificate
    played = {"agreement": 0.996, "scores": {"int8": [18.0], "original": [-21.0]}}
    print_certificate({**certificate, "int8": played})
    shown = "int8: 99.60% of the actions equal the original's\nscores of the same games: int8 +18; original -21\n"
    assert shown in capsys.readouterr().out


def test_doctor_diff_and_compile(own_store: ModelStore) -> None:
    store = ("--store", str(own_store.root))
    diagnosis = json.loads(actserve("doctor", "cart", "--json", *store).stdout)
    assert {row["runtime"]: row["runs"] for row in diagnosis["programs"]} == {"onnx": True, "pt2": True}
    assert "cart@1" in actserve("doctor", *store).stdout
    compiled = json.loads(actserve("compile", "cart", "--json", *store).stdout)
    assert compiled["version"] == 1, "it has a .pt2 for this host already"
    found = json.loads(actserve("diff", "cart@1", "cart", "--json", *store).stdout)
    assert found["signature"] == []
    assert "the same signature" in actserve("diff", "cart", "cart", *store).stdout


def test_verify_finds_corruption(own_store: ModelStore) -> None:
    (own_store.root / "cart" / "1" / "policy.onnx").write_bytes(b"x")
    result = actserve("verify", "cart", "--store", str(own_store.root))
    assert result.returncode == 1
    assert "policy.onnx has 1 bytes" in result.stderr
    assert "Traceback" not in result.stderr


def test_export_of_a_users_module(tmp_path: Path) -> None:
    store = ("--store", str(tmp_path))
    result = actserve("export", "tests.policies:cart_pair", "--runtime", "onnx", "--json", *store)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["name"], document["version"], document["published"]) == ("cart-pair", 1, True)
    again = json.loads(actserve("export", "tests.policies:cart_pair", "--runtime", "onnx", "--json", *store).stdout)
    assert not again["published"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "chess"), "a game of ale-py (breakout"),
        (("export", "pong", "--runtime", "tflite"), "--runtime takes"),
        (("train", "chess"), "expected pong, pong-lstm, boxing, a game of ale-py"),
        (("inspect", "pong@x"), "NAME@VERSION"),
        (("diff", "pong@x", "pong"), "NAME@VERSION"),
        (("serve", "--store", "nowhere"), "no model store at nowhere"),
        (("load", "--rate", "5", "--concurrency", "2"), "exclude each other"),
        (("nonsense",), "No such command"),
    ],
)
def test_usage_errors_exit_with_2_and_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = actserve(*arguments)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("play", "--url", "http://127.0.0.1:1"), "127.0.0.1:1"),
        (("load", "--url", "http://127.0.0.1:1", "--duration", "1"), "127.0.0.1:1"),
        (("inspect", "chess"), "no policy named 'chess'"),
        (("diff", "pong", "pong@7"), "pong has no version '7'"),
    ],
)
def test_jobs_that_cannot_be_done_exit_with_1(arguments: tuple[str, ...], message: str) -> None:
    result = actserve(*arguments)
    assert result.returncode == 1, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_program_that_must_be_built_and_cannot_is_an_error(tmp_path: Path) -> None:
    wanted = ("--runtime", "pt2", "--device", "cuda", "--store", str(tmp_path))
    result = actserve("export", "tests.policies:cart_pair", *wanted)
    assert result.returncode == 1, result.stderr
    assert "AOTInductor could not compile the program" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_policy_without_a_game_cannot_be_played(cart_store: ModelStore) -> None:
    with serve(cart_store.root, "--runtime", "onnx") as service:
        result = actserve("play", "--url", service.url)
        assert (result.returncode, "plays no game" in result.stderr) == (2, True)
        loaded = json.loads(actserve("load", "--url", service.url, "--duration", "0.5", "--json").stdout)
        assert loaded["requests"] > 0
        assert loaded["errors"] == {}
