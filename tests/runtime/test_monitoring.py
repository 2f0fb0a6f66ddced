"""A run's figures on Ray's Prometheus endpoint, and the dashboard and alerts that name them."""

import copy
import json
import re
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from shipped_cluster import CLUSTER, system_config

from raydmd.runtime.observability.metrics import Metrics, exported
from raydmd.runtime.observability.recorder import Recorder

LINE = {
    "phase": 2, "iteration": 3, "loss_fake": 0.75, "loss_discriminator": 0.5, "generator_grad_norm": 1.5,
    "fake_grad_norm": None, "generator_learning_rate": 2e-4, "fake_learning_rate": None, "staleness": 1,
    "samples": 64, "seconds": 0.4, "zeroed_samples": {"teacher": 2},
    "roles": {"teacher": {"busy_seconds": 0.2, "workers": 2}, "fake": {"busy_seconds": 0.4, "workers": 1}},
}  # fmt: skip
DASHBOARD = json.loads((CLUSTER / "grafana.json").read_text())
ALERTS = yaml.safe_load((CLUSTER / "alerts.yaml").read_text())
SCRAPE = yaml.safe_load((CLUSTER / "prometheus.yaml").read_text())
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard_expressions(dashboard: dict[str, Any]) -> list[str]:
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]
    return panels + variables


def alert_expressions(alerts: dict[str, Any]) -> list[str]:
    return [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]


def unknown(expressions: list[str], names: set[str]) -> set[str]:
    """Return the names of raydmd's metrics in the expressions that are not in ``names``."""
    found = {name for expression in expressions for name in re.findall(r"\w*raydmd\w*", expression)}
    assert found
    return found - names


@pytest.fixture(scope="module")
def scraped() -> Iterator[dict[str, Metric]]:
    """Report each figure from a real Ray with the cluster files' settings; return what its endpoint shows, by name."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(
        "local", num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False,
        _metrics_export_port=port, _node_ip_address="127.0.0.1",
        _system_config={**system_config("aws"), "metrics_report_interval_ms": 1000},
    )  # fmt: skip
    try:
        metrics = Metrics("digits")
        for _ in range(3):
            metrics.iteration(LINE)
        metrics.queue(7)
        metrics.waiting("teacher", 2)
        metrics.recovered("fake", "reformed", 0.4, 0)
        metrics.recovered("generator", "rolled_back", 3.0, 5)
        metrics.checkpoint(4096, 0.25)
        yield scrape(port)
    finally:
        ray.shutdown()


def scrape(port: int) -> dict[str, Metric]:
    end, missing, samples = time.monotonic() + 240, exported(), {}
    while missing:
        assert time.monotonic() < end, f"not shown: {sorted(missing)}"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                families = list(text_string_to_metric_families(answer.read().decode()))
        except OSError:
            families = []  # the agent is not up yet
        samples = {s.name: f for f in families for s in f.samples if "raydmd" in s.name}
        missing = exported() - set(samples)
        time.sleep(0.2)
    return samples


def values(scraped: dict[str, Metric], name: str, *tags: str) -> dict[tuple[str, ...], float]:
    """Return a metric's values by tags; each must have the run's."""
    found = [sample for sample in scraped[name].samples if sample.name == name]
    assert all(sample.labels["run"] == "digits" for sample in found)
    return {tuple(sample.labels[tag] for tag in tags): sample.value for sample in found}


def test_two_runs_of_one_recipe_have_two_labels(quick: Any, tmp_path: Path) -> None:
    def label(folder: Path) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        recorder = Recorder(folder, quick("ring"), 4, Console(quiet=True))
        recorder.close()
        return recorder.exported.run

    first, second = label(tmp_path / "one/digits"), label(tmp_path / "two/digits")
    assert first != second and first.startswith("digits-") and second.startswith("digits-")
    assert label(tmp_path / "one/../one/digits") == first  # continued


def test_the_endpoint_shows_just_the_names_that_are_told(scraped: dict[str, Metric]) -> None:
    assert set(scraped) == exported()


def test_the_values(scraped: dict[str, Metric]) -> None:
    assert values(scraped, "ray_raydmd_iterations_total", "phase") == {("2",): 3}
    assert values(scraped, "ray_raydmd_iteration_seconds_count") == {(): 3}
    buckets = values(scraped, "ray_raydmd_iteration_seconds_bucket", "le")
    assert buckets["0.2",] == 0 and buckets["0.5",] == 3
    assert values(scraped, "ray_raydmd_role_utilisation", "role") == {("teacher",): 0.25, ("fake",): 1.0}
    assert values(scraped, "ray_raydmd_role_workers", "role") == {("teacher",): 2, ("fake",): 1}
    assert values(scraped, "ray_raydmd_role_waiting", "role") == {("teacher",): 2}
    assert values(scraped, "ray_raydmd_recoveries_total", "role", "how") == {
        ("fake", "reformed"): 1,
        ("generator", "rolled_back"): 1,
    }
    assert values(scraped, "ray_raydmd_lost_steps_total") == {(): 5}
    assert values(scraped, "ray_raydmd_zeroed_samples_total", "role") == {("teacher",): 6}
    assert values(scraped, "ray_raydmd_recovery_seconds_count", "role") == {("fake",): 1, ("generator",): 1}
    assert values(scraped, "ray_raydmd_loss", "loss") == {("fake",): 0.75, ("discriminator",): 0.5}
    assert values(scraped, "ray_raydmd_gradient_norm", "role") == {("generator",): 1.5}
    assert values(scraped, "ray_raydmd_learning_rate", "role") == {("generator",): 2e-4}
    single = {"staleness": 1, "queue_depth": 7,
              "checkpoint_bytes": 4096, "checkpoint_seconds": 0.25}  # fmt: skip
    assert {name: values(scraped, f"ray_raydmd_{name}")[()] for name in single} == single


def test_dashboard_and_alerts_name_only_what_is_shown(scraped: dict[str, Metric]) -> None:
    assert unknown(dashboard_expressions(DASHBOARD), set(scraped)) == set()
    assert unknown(alert_expressions(ALERTS), set(scraped)) == set()
    gauges = {name.removesuffix("_count").removesuffix("_sum") for name in scraped}
    shown = " ".join(dashboard_expressions(DASHBOARD))
    assert {name for name in gauges if name not in shown} == set()  # and the dashboard shows all


def test_a_misspelt_metric_is_caught(scraped: dict[str, Metric]) -> None:
    dashboard, alerts = copy.deepcopy(DASHBOARD), copy.deepcopy(ALERTS)
    target = dashboard["panels"][0]["targets"][0]
    target["expr"] = target["expr"].replace("iterations_total", "iteration_total")
    assert unknown(dashboard_expressions(dashboard), set(scraped)) == {"ray_raydmd_iteration_total"}
    rule = alerts["groups"][0]["rules"][2]
    rule["expr"] = rule["expr"].replace("ray_", "")
    assert unknown(alert_expressions(alerts), set(scraped)) == {"raydmd_role_waiting"}


def test_expressions_are_promql() -> None:
    promql = pytest.importorskip("promql_parser")
    ready = [
        expression.replace("$__rate_interval", "5m").replace("$run", ".*")
        for expression in dashboard_expressions(DASHBOARD)
        if not expression.startswith("label_values(")  # Grafana's own function
    ] + alert_expressions(ALERTS)
    for expression in ready:
        promql.parse(expression)
    with pytest.raises(ValueError):
        promql.parse("sum by (run) (rate(ray_raydmd_iterations_total))")  # rate() needs a span of time


def test_the_shape_of_the_dashboard() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    assert variables["run"]["datasource"] == DATASOURCE and variables["run"]["includeAll"] is True
    assert DASHBOARD["title"] and DASHBOARD["uid"] == "raydmd" and DASHBOARD["schemaVersion"] >= 36
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["type"] == "timeseries" and panel["description"] and panel["datasource"] == DATASOURCE
        assert panel["targets"] and len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert target["datasource"] == DATASOURCE and target["legendFormat"]
            assert '{run=~"$run"}' in target["expr"]
        grid = panel["gridPos"]
        taken = {
            (x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert grid["x"] + grid["w"] <= 24 and not taken & cells, panel["title"]
        cells |= taken


def test_the_shape_of_rules_and_scraping() -> None:
    rules = [rule for group in ALERTS["groups"] for rule in group["rules"]]
    assert {rule["alert"] for rule in rules} == {
        "RaydmdLostSteps", "RaydmdRecoveriesInARow", "RaydmdRoleWaits", "RaydmdNoIteration",
    }  # fmt: skip
    for rule in rules:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert "$labels.run" in rule["annotations"]["summary"]
    assert all((CLUSTER / name).is_file() for name in SCRAPE["rule_files"])
    (job,) = SCRAPE["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}]
