"""The manifests in docs/kubernetes: against Kubernetes's own schemas, against each other, and against the code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from actserve import __version__
from actserve.core.settings import PREFIX, Settings
from actserve.server.healthcheck import PORT
from actserve.server.processes.supervisor import DRAIN_S
from tests.asgi import Caller
from tests.test_containers import BY_OPTION, DOCKERFILE
from tests.test_metrics import act, ready, running

FOLDER = Path(__file__).parent.parent / "docs" / "kubernetes"
ADAPTER = FOLDER / "queue-time" / "prometheus-adapter.yaml"
FILES = sorted(set(FOLDER.rglob("*.yaml")) - {ADAPTER})
OLDEST, NEWEST = "1.30", "1.37"  # 1.30 is the first with `sleep` before a stop, unless one asks for it


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return found


@pytest.fixture
def pod() -> Any:
    return load("deployment.yaml")["spec"]["template"]


@pytest.fixture
def container(pod: Any) -> Any:
    (only,) = pod["spec"]["containers"]
    return only


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FOLDER)))
def test_kubernetes_knows_every_field(file: Path, version: str) -> None:
    assert kubernetes_validate.validate(yaml.safe_load(file.read_text()), version, strict=True) == version


@pytest.mark.parametrize(
    ("where", "right", "wrong"),
    [
        ("securityContext", "readOnlyRootFilesystem", "readOnlyRootFileSystem"),
        ("readinessProbe", "periodSeconds", "period"),
    ],
)
def test_a_misspelt_field_is_found(where: str, right: str, wrong: str) -> None:
    manifest = load("deployment.yaml")
    section = manifest["spec"]["template"]["spec"]["containers"][0][where]
    section[wrong] = section.pop(right)
    with pytest.raises(kubernetes_validate.ValidationError, match=wrong):
        kubernetes_validate.validate(manifest, NEWEST, strict=True)


def test_the_pod_is_shut_in(pod: Any, container: Any) -> None:
    spec = pod["spec"]
    assert (spec["securityContext"]["runAsNonRoot"], spec["automountServiceAccountToken"]) == (True, False)
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert f"USER {spec['securityContext']['runAsUser']}\n" in DOCKERFILE
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} == container["resources"]["limits"].keys() == container["resources"]["requests"].keys()
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    assert all(volume["emptyDir"]["sizeLimit"] for volume in spec["volumes"])
    assert container["image"].endswith(f":{__version__}")


@pytest.fixture(scope="module")
def service() -> Iterator[Caller]:
    with running() as call:
        ready(call)
        act(call)
        yield call


def test_ports_and_paths_are_the_services(pod: Any, container: Any, service: Caller) -> None:
    annotations = pod["metadata"]["annotations"]
    probes = [container["livenessProbe"]["httpGet"], container["readinessProbe"]["httpGet"]]
    assert [probe["path"] for probe in probes] == ["/healthz", "/readyz"]
    for path in (*(probe["path"] for probe in probes), annotations["prometheus.io/path"]):
        assert service("GET", path).status == 200
    (port,) = container["ports"]
    assert (port["containerPort"], annotations["prometheus.io/port"]) == (PORT, str(PORT))
    (exposed,) = load("service.yaml")["spec"]["ports"]
    (ingress,) = load("network.yaml")["spec"]["ingress"]
    named = [*(probe["port"] for probe in probes), exposed["targetPort"], *(p["port"] for p in ingress["ports"])]
    assert set(named) == {port["name"]}


def test_every_variable_is_a_setting(container: Any) -> None:
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert {name.removeprefix(PREFIX).lower() for name in variables} <= Settings.model_fields.keys() - BY_OPTION
    settings = Settings.from_environment(variables)
    assert settings.sessions
    assert str(settings.sessions.parent) in [mount["mountPath"] for mount in container["volumeMounts"]]
    size = next(v["emptyDir"]["sizeLimit"] for v in load("deployment.yaml")["spec"]["template"]["spec"]["volumes"][1:])
    assert int(size.removesuffix("Gi")) << 30 >= 2 * settings.max_session_bytes


def test_the_others_mean_this_deployment(pod: Any) -> None:
    deployment = load("deployment.yaml")
    labels = pod["metadata"]["labels"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        pod["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
        load("service.yaml")["spec"]["selector"],
        load("disruption.yaml")["spec"]["selector"]["matchLabels"],
        load("network.yaml")["spec"]["podSelector"]["matchLabels"],
    ]
    assert selectors == [labels] * len(selectors)
    for name in ("autoscaler.yaml", "queue-time/autoscaler.yaml"):
        autoscaler = load(name)
        target = autoscaler["spec"]["scaleTargetRef"]
        assert target == {key: deployment[key] for key in ("apiVersion", "kind")} | {
            "name": deployment["metadata"]["name"]
        }
    assert (
        load("autoscaler.yaml")["metadata"] == load("queue-time/autoscaler.yaml")["metadata"]
    )  # one replaces the other
    assert "replicas" not in deployment["spec"]  # applying it again would undo what the autoscaler did


def test_a_pod_may_end_what_it_has_begun(pod: Any, container: Any) -> None:
    before_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > before_s + DRAIN_S


def test_a_client_keeps_to_its_pod_for_as_long_as_its_session_may_be_idle() -> None:
    spec = load("service.yaml")["spec"]
    assert spec["sessionAffinity"] == "ClientIP"
    assert spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"] >= Settings().session_idle_s


def test_the_autoscalers_metric_is_made_of_one_that_a_scrape_has(service: Caller) -> None:
    (rule,) = yaml.safe_load(ADAPTER.read_text())["rules"]["custom"]
    (metric,) = load("queue-time/autoscaler.yaml")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    text = service("GET", "/metrics").content.decode()
    names = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    series = re.match(r"\w+", rule["seriesQuery"])
    assert series
    assert series[0] in names
