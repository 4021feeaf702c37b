"""
Asks a running Prometheus for every query of the dashboard; while the service is under load, each must return data.

    python docker/grafana/check_queries.py                         # http://localhost:9090
    python docker/grafana/check_queries.py http://prometheus:9090

Exit code 0 when every query returned at least one finite number and every alert rule was loaded and healthy, else 1.
What calibration expects may be NaN: thresholds of one's own were not measured.
Needs nothing but Python.
"""

import json
import math
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parent / "dashboards" / "ride.json"
VARIABLES = {"$__rate_interval": "30s", "$quantile": "0.95"}  # what Grafana puts in their place


def dashboard_queries(dashboard: Path = DASHBOARD) -> list[tuple[str, str]]:
    """(panel title and legend, PromQL with Grafana's variables filled in) for every query of every panel."""
    panels = json.loads(dashboard.read_text(encoding="utf-8"))["panels"]
    queries = [
        (f"{panel['title']} [{target['legendFormat']}]", target["expr"])
        for panel in panels
        for target in panel.get("targets", [])
    ]
    for variable, value in VARIABLES.items():
        queries = [(title.replace(variable, value), expr.replace(variable, value)) for title, expr in queries]
    return queries


def ask(prometheus: str, path: str, **parameters: str) -> Any:
    """The `data` of an answer of Prometheus's HTTP API."""
    url = f"{prometheus.rstrip('/')}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)["data"]


def main(prometheus: str) -> int:
    """Prints a line for every target, rule and query; returns the exit code."""
    failed = 0

    def report(good: bool, what: str, detail: str) -> None:
        nonlocal failed
        failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {what}: {detail}")

    try:
        targets = ask(prometheus, "targets")["activeTargets"]
    except urllib.error.URLError as error:
        print(f"FAIL {prometheus} does not answer ({error.reason}); is it up? docker compose ps", file=sys.stderr)
        return 1
    for target in targets:
        report(target["health"] == "up", f"target {target['scrapeUrl']}", target["lastError"] or target["health"])
    rules = [rule for group in ask(prometheus, "rules")["groups"] for rule in group["rules"]]
    report(bool(rules), "rules", f"{len(rules)} loaded")
    for rule in rules:
        report(rule["health"] == "ok", f"rule {rule['name']}", rule.get("lastError") or rule.get("state", "recorded"))

    for title, expr in dashboard_queries():
        try:
            series = ask(prometheus, "query", query=expr)["result"]
        except urllib.error.HTTPError as error:
            report(False, title, f"{json.load(error)['error']} in {expr}")
            continue
        finite = [value for value in (float(one["value"][1]) for one in series) if math.isfinite(value)]
        found = " ".join(f"{value:.4g}" for value in finite[:8]) or f"no data for {expr}"
        report(bool(finite or (series and "ride_calibrated" in expr)), title, found)
    print(f"{failed} failed" if failed else "all good")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:] or ["http://localhost:9090"]))
