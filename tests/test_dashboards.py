"""The files in docs/dashboards fit the service: a scrape has every metric and label in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.test_metrics import SCREEN, act, ready, running

FOLDER = Path(__file__).parent.parent / "docs" / "dashboards"
GUIDE = FOLDER.parent / "observability.md"
METRIC = re.compile(r"\b(?:actserve|process)_[a-z_]+")
ADDED = {"job", "instance"}  # labels by Prometheus itself


@pytest.fixture(scope="module")
def dashboard() -> Any:
    return json.loads((FOLDER / "grafana.json").read_text())


@pytest.fixture(scope="module")
def labels() -> dict[str, set[str]]:
    """The labels of each sample in a scrape, by the sample's name."""
    with running() as call:
        ready(call)
        act(call)
        act(call, body=SCREEN[:-1])
        for meters in call.app.state.registry.counts.programs.values():
            meters.add_limited(np.zeros(1, np.uint8))  # as if the policies had limits
        text = call("GET", "/metrics").content.decode()
    return {
        sample.name: set(sample.labels) for family in text_string_to_metric_families(text) for sample in family.samples
    }


def expressions(dashboard: Any) -> Iterator[str]:
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    yield from (v["definition"] for v in dashboard["templating"]["list"] if v["type"] == "query")


def test_every_metric_and_label_of_the_dashboard_is_in_a_scrape(dashboard: Any, labels: dict[str, set[str]]) -> None:
    named = set()
    for expression in expressions(dashboard):
        metrics = set(METRIC.findall(expression))
        assert metrics
        assert metrics <= labels.keys(), expression
        used = {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")}
        used |= set(re.findall(r"[{ ](\w+)=~?\"", expression))
        for metric in metrics:
            assert used <= labels[metric] | ADDED, expression
        named |= metrics
    families = {re.sub(r"_(total|sum|count|bucket)$", "", name) for name in labels if name.startswith("actserve_")}
    shown = {re.sub(r"_(total|sum|count|bucket)$", "", name) for name in named}
    assert families - shown == {"actserve_actions_per_second"}  # which is for those without Prometheus


def test_legends_name_labels_that_their_expression_keeps(dashboard: Any, labels: dict[str, set[str]]) -> None:
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            kept = {label for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in group.split(", ")}
            kept = kept or labels[METRIC.findall(target["expr"])[0]]
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept


def test_the_dashboard_has_what_grafana_imports(dashboard: Any) -> None:
    assert dashboard["schemaVersion"] >= 36  # data sources as objects
    assert dashboard["title"]
    assert dashboard["uid"]
    assert "id" not in dashboard  # which is one installation's
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard))) - {"__rate_interval", "__all"}
    assert used == variables.keys()
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        places.add((place["x"], place["y"]))
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
        for source in (panel, *panel["targets"]):
            assert source["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert len(places) == len(panels)


def test_the_scrape_configuration_scrapes_the_service() -> None:
    (job,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    assert (job["job_name"], job["metrics_path"]) == ("actserve", "/metrics")
    assert job["static_configs"] == [{"targets": ["127.0.0.1:8000"]}]


def test_the_guide_names_every_metric_and_no_other(labels: dict[str, set[str]]) -> None:
    ours = {re.sub(r"_(sum|count|bucket)$", "", name) for name in labels if name.startswith("actserve_")}
    table = [line for line in GUIDE.read_text().splitlines() if line.startswith("| `actserve_")]
    told = {match: line for line in table for match in re.findall(r"`(actserve_\w+)`", line.split("|")[1])}
    assert told.keys() == ours
    for name, line in told.items():
        known = labels.get(name) or labels.get(name + "_bucket", set()) - {"le"}
        assert set(re.findall(r"`(\w+)`", line.split("|")[3])) == known, name
