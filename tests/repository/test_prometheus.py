"""
A Prometheus server scrapes four workers, as the page prometheus.md describes.

It evaluates each expression of the dashboard and of the alerts, before an outage, in it
and after it. `nox -s prometheus` runs this. promtool tests the times of the alerts.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

from kit.pages import ROOT, listens
from kit.waiting import until


pytestmark = [
    pytest.mark.real_clock,
    pytest.mark.nightly,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        "PROMETHEUS" not in os.environ,
        reason="PROMETHEUS names no Prometheus server: `nox -s prometheus` does",
    ),
]

OBSERVABILITY = ROOT / "observability"
WORKERS = 4
PATIENCE = 60.0
"""Seconds that a change may take to appear in Prometheus."""


def expressions():
    """Return each expression of the dashboard and of the alerts, by its place."""
    found = {}
    dashboard = json.loads((OBSERVABILITY / "grafana-dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for number, target in enumerate(panel.get("targets", ())):
            found[f"{panel['title']} {number}"] = target["expr"]
    for group in yaml.safe_load((OBSERVABILITY / "alerts.yaml").read_text())["groups"]:
        found |= {rule["alert"]: rule["expr"] for rule in group["rules"]}
    return {
        place: expr.replace("$__rate_interval", "1m")
        .replace("$job", ".*")
        .replace("$instance", ".*")
        .replace("$pool", ".*")
        for place, expr in found.items()
    }


class Prometheus:
    """A Prometheus server with the files of the page."""

    def __init__(self, folder, port):
        self._url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [
                os.environ["PROMETHEUS"],
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ]
        )
        until(self._is_ready, PATIENCE)

    def _is_ready(self):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{self._url}/-/ready", timeout=5).close()
            return True
        return False

    def _get(self, path, **parameters):
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                told = json.load(answer)
        except urllib.error.HTTPError as error:
            told = json.load(error)
        assert told["status"] == "success", told
        assert not told.get("warnings"), told
        return told["data"]

    def query(self, expr):
        """Return the result of *expr* now: a list of series with their values."""
        return self._get("query", query=expr)["result"]

    def states(self):
        """Return the states of each alert that is not inactive."""
        found = {}
        for alert in self._get("alerts")["alerts"]:
            found.setdefault(alert["labels"]["alertname"], []).append(alert["state"])
        return found

    def close(self):
        self._process.terminate()
        self._process.wait(30)


class Visitor:
    """A client that asks for a document all the time."""

    def __init__(self, port):
        self._url = f"http://127.0.0.1:{port}/documents/7"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._visit)
        self._thread.start()

    def _visit(self):
        while not self._stopped.wait(0.02):
            # A connection for each request, so that all workers get some.
            request = urllib.request.Request(self._url, headers={"x-user": "alice"})
            with contextlib.suppress(OSError):
                urllib.request.urlopen(request, timeout=20).close()

    def close(self):
        self._stopped.set()
        self._thread.join()


def evaluated(prometheus):
    """Evaluate each expression. Return the places of those that have a result."""
    return {place for place, expr in expressions().items() if prometheus.query(expr)}


def test_a_prometheus_server_evaluates_each_expression_in_an_outage(
    walk, metrics_ports, embedded_authorizer, tmp_path
):
    first, ports = metrics_ports
    with (
        walk("prometheus.md", ports, METRICS_PORT=str(first)) as walking,
        contextlib.ExitStack() as opened,
    ):
        walking.run()
        config = tmp_path / "prometheus.yml"
        written = config.read_text().replace(
            "scrape_interval: 15s", "scrape_interval: 1s\n  evaluation_interval: 1s"
        )
        config.write_text(written)
        shutil.copy(OBSERVABILITY / "alerts.yaml", tmp_path)
        prometheus = Prometheus(tmp_path, first + len(ports))
        opened.callback(prometheus.close)
        visitor = Visitor(walking.ports[8000])
        opened.callback(visitor.close)

        def workers(expr):
            return lambda: len(prometheus.query(expr)) == WORKERS

        until(workers("up == 1"), PATIENCE)
        until(workers("rate(topaz_pool_acquisitions_total[1m]) > 0"), PATIENCE)
        until(workers("topaz_pool_healthy == 1"), PATIENCE)
        calm = evaluated(prometheus)
        assert "TopazPoolNoHealthyConnection" not in calm
        assert prometheus.states() == {}

        embedded_authorizer.stop()
        until(workers("topaz_pool_healthy == 0"), PATIENCE)
        until(workers("increase(topaz_pool_connect_failures_total[1m]) > 0"), PATIENCE)
        outage = evaluated(prometheus)
        assert "TopazPoolNoHealthyConnection" in outage
        pending = {"TopazPoolNoHealthyConnection": ["pending"] * WORKERS}
        until(lambda: pending.items() <= prometheus.states().items(), PATIENCE)
        graphs = {place for place in expressions() if not place.startswith("Topaz")}
        assert graphs - calm - outage == set()

        embedded_authorizer.start()
        until(workers("topaz_pool_healthy == 1"), PATIENCE)
        until(lambda: not prometheus.query("topaz_pool_healthy == 0"), PATIENCE)
        assert "TopazPoolNoHealthyConnection" not in evaluated(prometheus)
        assert all(listens(port) for port in list(ports.values())[:WORKERS])
        assert Path(tmp_path, "data").is_dir()
