"""The Dockerfile and the compose files: that they fit each other and the code, and that what runs is shut in."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from actserve.cli.main import cli
from actserve.core.settings import PREFIX, Settings
from actserve.server.healthcheck import PORT, ready
from actserve.server.processes.supervisor import DRAIN_S
from tests.page_service import running

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
STAGES = re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE)
MAIN = "docker-compose.yml"
OVERRIDES = ["docker-compose.pt2.yml", "docker-compose.gpu.yml"]
BY_OPTION = {"runtime", "workers", "grpc_host", "shared"}  # `actserve serve` sets them, whatever a variable says
COMMAND = typer.main.get_command(cli)


def services(file: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / file).read_text())["services"]
    return found


@pytest.mark.parametrize("service", services(MAIN).values(), ids=services(MAIN))
def test_every_container_is_shut_in(service: dict[str, Any]) -> None:
    assert service["read_only"]
    assert [mount.partition(":")[0] for mount in service["tmpfs"]] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"mem_limit", "cpus", "pids_limit"} <= service.keys()
    assert not {"privileged", "cap_add", "devices", "network_mode", "pid", "user"} & service.keys()
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:")


def test_no_image_runs_as_root() -> None:
    base = DOCKERFILE[DOCKERFILE.index(" AS base\n") :]
    assert re.findall(r"^USER (.*)$", base, re.MULTILINE) == ["10001"]
    below = re.findall(r"^FROM (?:base|service) AS (\S+)$", base, re.MULTILINE)
    for file in (MAIN, *OVERRIDES):
        assert {service["build"]["target"] for service in services(file).values()} <= {*below}


@pytest.mark.parametrize("file", [MAIN, *OVERRIDES])
def test_every_image_is_built_here(file: str) -> None:
    for service in services(file).values():
        assert service["build"]["target"] in STAGES
        arguments = set(service["build"].get("args", {}))
        assert arguments <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    assert file == MAIN or services(file).keys() <= services(MAIN).keys()


def test_the_base_image_can_be_another() -> None:
    assert next(line for line in DOCKERFILE.splitlines() if line and line[0] != "#").startswith("ARG BASE_IMAGE=")
    for service in services(MAIN).values():
        assert "BASE_IMAGE" in service["build"]["args"]
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {name for names in copied for name in names.split()} == sent
    assert all((ROOT / name).exists() for name in sent)


def test_what_is_published_is_sent_whole() -> None:
    left_out = {line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("!")}
    assert left_out == {"*", "**/__pycache__"}  # of an artifact that lacks a program nothing is served


def test_only_the_override_asks_for_a_gpu_and_only_it_for_torch_with_cuda() -> None:
    assert "deploy" not in json.dumps(services(MAIN))
    (gpu,) = services("docker-compose.gpu.yml").values()
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    pinned = next(
        line for line in (ROOT / ".ci/constraints.txt").read_text().splitlines() if line.startswith("torch==")
    )
    assert f"\nARG TORCH={pinned}+cpu\n" in DOCKERFILE  # which an index without builds for CPUs does not have
    assert gpu["build"]["args"]["TORCH"] == pinned


def test_the_service_may_end_what_it_has_begun_and_answers_where_it_is_asked() -> None:
    service = services(MAIN)["service"]
    assert int(service["stop_grace_period"].removesuffix("s")) > DRAIN_S
    (port,) = service["ports"]
    assert port.endswith(f":{PORT}")
    assert f"EXPOSE {PORT}\n" in DOCKERFILE
    assert f'"--port", "{PORT}"]' in DOCKERFILE
    assert (
        '\nHEALTHCHECK --interval=3s --timeout=3s --retries=40 CMD ["python", "-m", "actserve.server.healthcheck"]\n'
        in DOCKERFILE
    )
    for name, client in services(MAIN).items():
        if name != "service":
            assert client["depends_on"] == {"service": {"condition": "service_healthy"}}
            assert client["environment"]["ACTSERVE_URL"] == f"http://service:{PORT}"


@pytest.mark.parametrize("file", [MAIN, *OVERRIDES])
def test_settings_and_commands_are_ones_that_there_are(file: str) -> None:
    options = {name: {flag for p in command.params for flag in p.opts} for name, command in commands().items()}
    for service in services(file).values():
        variables = {k: str(v) for k, v in service.get("environment", {}).items()}
        assert {name.removeprefix(PREFIX).lower() for name in variables} <= {*Settings.model_fields, "url"} - BY_OPTION
        Settings.from_environment(variables)
        words = shlex.split(" ".join(service.get("command", [])).replace(";", " ; "))
        for at, word in enumerate(words):
            if word == "actserve":
                ours = words[at + 2 : words.index(";", at) if ";" in words[at:] else None]
                assert {option for option in ours if option.startswith("--")} <= options[words[at + 1]]
    for command in re.findall(r"actserve (\w+)", "\n".join(re.findall(r"^(?:RUN|CMD).*", DOCKERFILE, re.MULTILINE))):
        assert command in options


def commands() -> dict[str, Any]:
    assert isinstance(COMMAND, typer.core.TyperGroup)
    context = typer.Context(COMMAND)
    return {name: COMMAND.get_command(context, name) for name in COMMAND.list_commands(context)}


def compose(*files: str) -> list[str]:
    return ["docker", "compose", *(word for file in files for word in ("-f", file))]


def has_compose() -> bool:
    return (
        shutil.which("docker") is not None
        and not subprocess.run([*compose(), "version"], capture_output=True).returncode
    )


@pytest.mark.skipif(not has_compose(), reason="needs docker compose")
@pytest.mark.parametrize("override", OVERRIDES)
def test_compose_lays_an_override_over_the_rest(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTSERVE_USER", "1000")
    monkeypatch.setenv("ACTSERVE_STORE", "/somewhere")
    done = subprocess.run(
        [*compose(MAIN, override), "config", "--format", "json"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    service = json.loads(done.stdout)["services"]["service"]
    assert service["build"]["target"] == "serve-pt2"
    assert "BASE_IMAGE" in service["build"]["args"]
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert service["ports"][0]["host_ip"] == "127.0.0.1"
    (tmp,) = service["tmpfs"]
    assert tmp.endswith(",exec")  # native code is unpacked there


def test_ready_is_what_readyz_says() -> None:
    with running() as service:
        port = int(service.address.rpartition(":")[2])
        assert ready(port)
    assert not ready(port)
