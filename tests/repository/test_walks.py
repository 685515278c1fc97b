"""Test the pages that build an application: their files and commands, as printed."""

from __future__ import annotations

import http.server
import importlib.util
import re
import threading

import pytest

from kit.pages import DOCS
from kit.waiting import until


pytestmark = pytest.mark.real_clock

OTLP = "opentelemetry.exporter.otlp.proto.http"


@pytest.mark.parametrize(
    "name",
    [
        "lifespan.md",
        pytest.param("lists.md", marks=pytest.mark.slow),
        pytest.param("testing.md", marks=pytest.mark.slow),
        pytest.param("kubernetes.md", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(180)
def test_a_page_works_as_printed(name, walk):
    with walk(name) as walking:
        walking.run()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_each_worker_serves_its_metrics_as_on_the_page_prometheus(walk, metrics_ports):
    first, ports = metrics_ports
    with walk("prometheus.md", ports, METRICS_PORT=str(first)) as walking:
        walking.run()


class Receiver(http.server.BaseHTTPRequestHandler):
    """An OTLP receiver that keeps the requests of its server."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.received.append((self.path, body))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        """Write no log."""


@pytest.fixture
def receiver():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        server.received = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.skipif(
    importlib.util.find_spec("opentelemetry") is None
    or importlib.util.find_spec("opentelemetry.exporter") is None
    or importlib.util.find_spec("opentelemetry.exporter.otlp") is None,
    reason=f"no {OTLP}: `nox -s docs` installs it",
)
@pytest.mark.timeout(180)
def test_the_trace_of_the_page_traces_arrives(walk, receiver):
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
        ExportTraceServiceRequest,
    )

    endpoint = f"http://127.0.0.1:{receiver.server_address[1]}"
    with walk("traces.md", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint) as walking:
        walking.run()
    # The walk has stopped the application, so its last spans are sent.
    until(lambda: receiver.received)
    spans = [
        span
        for path, body in receiver.received
        if path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    (check,) = [span for span in spans if span.name == "topaz.check"]
    (request,) = [span for span in spans if span.span_id == check.parent_span_id]
    assert request.name == "GET /documents/{id}"
    found = {
        each.key: each.value.string_value or str(each.value.int_value)
        for each in check.attributes
    }
    page = (DOCS / "traces.md").read_text()
    printed = dict(re.findall(r"^\| `([\w.]+)` \| `(.*)` \|$", page, re.MULTILINE))
    assert printed
    assert {name: found[name] for name in printed} == printed
