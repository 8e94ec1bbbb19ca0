"""Prometheus scrapes the service with the configuration of docs/dashboards, and evaluates every query of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import urllib3

from actserve.cli.tools import local_service as local
from actserve.client.remote_policy import RemotePolicy
from tests.shipped import SHIPPED
from tests.test_dashboards import FOLDER, expressions
from tests.waiting import until

PROMETHEUS = shutil.which("prometheus")
SCREEN = np.zeros((210, 160, 3), np.uint8)
VARIABLES = {"$job": "actserve", "$policy": ".*", "$__rate_interval": "1m"}
# Nothing was refused, no policy has limits, and there is no shadow.
EMPTY = {"actserve_limited_total", "actserve_refused_total", "actserve_shadow_items_total"}

# In CI a missing Prometheus is a failure.
pytestmark = pytest.mark.skipif(
    PROMETHEUS is None and not os.environ.get("CI"), reason="this needs Prometheus: apt-get install prometheus"
)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus that has scraped a service in use."""
    folder, port = tmp_path_factory.mktemp("prometheus"), local.free_port()
    url = f"http://127.0.0.1:{port}"
    assert PROMETHEUS is not None, "apt-get install prometheus"
    with local.serve(SHIPPED, "--runtime", "onnx", "--workers", "2") as service:
        shipped = (FOLDER / "prometheus.yml").read_text()
        configuration = folder / "prometheus.yml"
        configuration.write_text(
            shipped.replace("127.0.0.1:8000", service.url.removeprefix("http://")).replace("15s", "1s")
        )
        command = [PROMETHEUS, f"--config.file={configuration}", f"--storage.tsdb.path={folder}/data"]
        command += [f"--web.listen-address=127.0.0.1:{port}"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process, RemotePolicy(service.url) as policy:
            try:
                until(lambda: scrapes(url, policy) >= 4 or process.poll() is not None)
                assert process.poll() is None
                yield url
            finally:
                process.terminate()


def scrapes(url: str, policy: RemotePolicy) -> float:
    """How many scrapes have succeeded; the policy acts meanwhile."""
    policy.act(SCREEN)
    try:
        if urllib3.request("GET", f"{url}/-/ready", timeout=5, retries=False).status != 200:
            return 0
        found = query(url, 'sum(count_over_time(up{job="actserve"}[1m]) * up{job="actserve"})')
    except urllib3.exceptions.HTTPError:  # it has not started
        return 0
    return float(found[0]["value"][1]) if found else 0


def query(url: str, expression: str) -> Any:
    answer = urllib3.request("GET", f"{url}/api/v1/query", fields={"query": expression}, timeout=30, retries=False)
    document = answer.json()
    assert document["status"] == "success", (expression, document)
    return document["data"]["result"]


def test_every_query_of_the_dashboard_has_a_result(prometheus: str) -> None:
    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    asked = 0
    for expression in expressions(dashboard):
        if expression.startswith("label_values("):  # Grafana's own
            continue
        for variable, value in VARIABLES.items():
            expression = expression.replace(variable, value)
        result = query(prometheus, expression)
        assert result or any(name in expression for name in EMPTY), expression
        asked += 1
    assert asked > 20


def test_no_metric_of_the_service_is_refused(prometheus: str) -> None:
    (target,) = urllib3.request("GET", f"{prometheus}/api/v1/targets").json()["data"]["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    names = set(urllib3.request("GET", f"{prometheus}/api/v1/label/__name__/values").json()["data"])
    assert {"actserve_requests_total", "actserve_loop_lag_seconds_bucket", "actserve_connection_bytes"} <= names
