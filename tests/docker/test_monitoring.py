"""The dashboard and the alert rules, against the metrics that the service has."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import yaml
from prometheus_client import CollectorRegistry

from model_export.bundle import Macs
from service.errors import STATUS
from service.metrics import Metrics
from service.operating_point import Operation

DOCKER = Path(__file__).parents[2] / "docker"
GRAFANA = DOCKER / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "ride.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = [rule for group in yaml.safe_load((DOCKER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]] + [rule["expr"] for rule in RULES]
ALERTS = {rule["alert"] for rule in RULES if "alert" in rule}


def load(name: str) -> ModuleType:
    """A script beside the dashboard, as a module."""
    spec = importlib.util.spec_from_file_location(name, GRAFANA / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_dashboard_is_what_the_code_makes():
    """After a change of dashboard.py: python docker/grafana/dashboard.py"""
    assert load("dashboard").dashboard_json() == (GRAFANA / "dashboards" / "ride.json").read_text()


def test_every_panel_can_be_read():
    """A title, a sentence that says what it shows, a unit, queries, and a number of its own."""
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in PANELS:
        assert all(panel[part] for part in ("title", "description", "targets"))
        field = panel["options"]["yAxis"] if panel["type"] == "heatmap" else panel["fieldConfig"]["defaults"]
        assert field["unit"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"prometheus"}


def test_alert_tests_show_each_alert_firing_and_silent():
    """promtool runs them; this holds that none was forgotten."""
    tests = [
        test
        for group in yaml.safe_load((DOCKER / "alerts_test.yml").read_text())["tests"]
        for test in group["alert_rule_test"]
    ]
    assert {test["alertname"] for test in tests if test.get("exp_alerts")} == ALERTS
    fired = [alert for test in tests for alert in test.get("exp_alerts", ())]
    assert all(alert["exp_labels"]["instance"] not in ("fine", "idle") for alert in fired)


def metrics_of_the_service() -> dict[str, set[str]]:
    """Names as Prometheus stores them, with their labels, of a service with three experts."""
    manifest = SimpleNamespace(
        name="m",
        version="1",
        n_experts=3,
        splits=("many", "few"),
        macs=Macs(trunk=1, experts=(1, 1, 1), routers=(1, 1)),
    )
    registry = CollectorRegistry()
    metrics = Metrics(registry, manifest, Operation("router", (0.5, 0.5), 3, None, {}), waiting=lambda: 0, limit=1)
    metrics.engine_started(variant="fp32", provider="cpu", onnxruntime="1")
    found: dict[str, set[str]] = {}
    for family in registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_every_metric_and_label_that_is_shown_or_alerted_on_exists():
    """A renamed metric leaves a panel empty and an alert silent for ever; this fails instead."""
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    metrics = metrics_of_the_service()
    for expression in EXPRESSIONS:
        bare = re.sub(r'"[^"]*"|\$\w+', "", expression)
        names = set(re.findall(r"\bride[_:]\w+(?:[:]\w+)*", bare))
        assert names - recorded <= set(metrics), expression
        labels = {label for names in re.findall(r"\bby \(([^)]*)\)", bare) for label in re.findall(r"\w+", names)}
        labels |= set(re.findall(r"(\w+)(?:=~|!=|=)(?!=)", bare))
        known = set().union(*(metrics.get(name, set()) for name in names), {"instance", "job", "alertstate"})
        assert labels <= known, expression
        values = dict(re.findall(r'(code|experts|reason|split|stage)="([^"]*)"', expression))
        assert set(values) <= {"code", "experts", "reason"}, "check here that another label's values exist"
    codes = set(re.findall(r'code="(\d+)"', " ".join(EXPRESSIONS)))
    assert codes <= {str(status) for status in STATUS.values()}
    assert set(re.findall(r'reason="(\w+)"', " ".join(EXPRESSIONS))) <= set(STATUS)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "command", ["check config prometheus.yml", "check rules alerts.yml", "test rules alerts_test.yml"]
)
def test_promtool_agrees(command):
    """Prometheus's own checks pass, and the alert tests with them."""
    checked = subprocess.run(["promtool", *command.split()], cwd=DOCKER, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


class FakePrometheus(BaseHTTPRequestHandler):
    """Answers every query with `samples`, and lists one healthy target and one rule."""

    samples: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        """One answer of Prometheus's HTTP API."""
        data = {
            "targets": {"activeTargets": [{"scrapeUrl": "http://x", "health": "up", "lastError": ""}]},
            "rules": {"groups": [{"rules": [{"name": "RideDown", "health": "ok", "state": "inactive"}]}]},
            "query": {"result": [{"metric": {}, "value": [0, sample]} for sample in self.samples]},
        }[self.path.split("?")[0].rpartition("/")[2]]
        body = json.dumps({"status": "success", "data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.mark.parametrize(("samples", "code"), [(["1", "NaN"], 0), ([], 1), (["NaN"], 1)])
def test_the_query_check_wants_a_number_for_every_query(samples, code, capsys):
    """An empty answer and one of NaN alone are both a panel without data; calibration may have nothing to expect."""
    handler = type("Handler", (FakePrometheus,), {"samples": samples})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        assert load("check_queries").main(f"http://127.0.0.1:{server.server_port}") == code
        server.shutdown()
    lines = capsys.readouterr().out.splitlines()
    queries = [target["expr"] for panel in PANELS for target in panel["targets"]]
    failing = [query for query in queries if not samples or "ride_calibrated" not in query] if code else []
    assert sum(line.startswith("FAIL") for line in lines) == len(failing)


def test_the_query_check_says_when_nobody_answers():
    """Without a Prometheus: one line with the next step, no stack trace."""
    script = GRAFANA / "check_queries.py"
    checked = subprocess.run(
        [sys.executable, script, "http://127.0.0.1:9"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 1
    assert "docker compose ps" in checked.stderr
    assert "Traceback" not in checked.stderr
