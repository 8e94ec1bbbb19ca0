from __future__ import annotations

import dataclasses

import pytest

from app.artifact import Artifact, Manifest, Program
from app.errors import RuntimeRefused
from app.runtimes.preflight import Host, choose, refusal, this_host


def requiring(cart: Artifact, **requires: object) -> Manifest:
    programs = {"onnx": Program("policy.onnx"), "pt2": Program("policy.pt2", requires)}
    return dataclasses.replace(cart.manifest, programs=programs)


def test_this_host_runs_what_was_built_here(cart: Artifact) -> None:
    choice = choose("auto", cart.manifest, this_host(), {})
    assert choice.runtime == "pt2"
    assert "the first that this host can run" in choice.reason
    assert choose("onnx", cart.manifest, this_host(), {}).reason == ".onnx: asked for by --runtime onnx"


@pytest.mark.parametrize(
    ("requires", "reason"),
    [
        ({"platform": "Darwin-arm64"}, "built for Darwin-arm64, this host is Linux-x86_64"),
        ({"torch": "9.9.9"}, "built for torch 9.9.9, this host has 2.13.0"),
        ({"glibc": "99.1"}, r"needs glibc 99\.1, this host has 2\.36"),
        ({"cpu_flags": ["avx2", "amx"]}, "needs the CPU features amx, which this host lacks"),
    ],
)
def test_a_missing_requirement_is_named_and_auto_falls_back(
    cart: Artifact, requires: dict[str, object], reason: str
) -> None:
    host = Host("Linux", "x86_64", (2, 36), frozenset({"avx2"}), {"torch": "2.13.0", "onnxruntime": "1.31.1"})
    manifest = requiring(cart, **requires)
    with pytest.raises(RuntimeRefused, match=reason):
        choose("pt2", manifest, host, {})
    choice = choose("auto", manifest, host, {})
    assert choice.runtime == "onnx"
    assert choice.reason.startswith("not .pt2: ")


def test_without_torch_there_is_no_pt2(cart: Artifact) -> None:
    host = dataclasses.replace(this_host(), packages={"onnxruntime": "1.31.1"})
    assert refusal("pt2", cart.manifest, host) == "torch is not installed here"
    assert refusal("onnx", cart.manifest, host) is None


def test_an_absent_program_and_a_failed_one_are_reasons(cart: Artifact) -> None:
    only_onnx = dataclasses.replace(cart.manifest, programs={"onnx": Program("policy.onnx")})
    assert refusal("pt2", only_onnx, this_host()) == "cart@1 has no .pt2 program"
    choice = choose("auto", cart.manifest, this_host(), {"pt2": "it crashed"})
    assert (choice.runtime, choice.reason[:21]) == ("onnx", "not .pt2: it crashed;")


def test_when_nothing_runs_every_reason_is_given(cart: Artifact) -> None:
    with pytest.raises(RuntimeRefused, match=r"not \.pt2: .*; not \.onnx: onnxruntime is not installed"):
        choose("auto", cart.manifest, dataclasses.replace(this_host(), packages={}), {})
