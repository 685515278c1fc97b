"""Test that the dashboard and the alerts query exported metrics."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import anyio
import attrs
import promql_parser as promql
import pytest
import yaml
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fastapi_topaz import ConnectionPool
from kit.allowing import allowing
from kit.configs import config_of
from kit.decisions import http_request


HERE = Path(__file__).parent.parent.parent / "observability"
DASHBOARD = json.loads((HERE / "grafana-dashboard.json").read_text())
(GROUP,) = yaml.safe_load((HERE / "alerts.yaml").read_text())["groups"]
RULES = {rule["alert"]: rule for rule in GROUP["rules"]}
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
GRAPHS = [panel for panel in PANELS if panel["type"] != "text"]
TARGETS = [(panel["title"], target) for panel in GRAPHS for target in panel["targets"]]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}

# Prometheus adds these labels to every scraped series.
SCRAPE = {"job", "instance"}


@attrs.frozen
class Exported:
    """A scrape: the type of each metric, and its labels with their values."""

    types: dict[str, str]
    labels: dict[str, dict[str, set[str]]]


@pytest.fixture(scope="module")
def exported():
    async def scrape():
        provider = MeterProvider([PrometheusMetricReader()])
        pool = ConnectionPool(
            connector=allowing(), meter_provider=provider, name="named"
        )
        config = config_of(pool, meter_provider=provider)
        try:
            async with pool:
                # The first answer comes from the authorizer, the second one does not.
                request = http_request()
                for _ in range(2):
                    assert await config.is_allowed(request, "app.x")
                return generate_latest(REGISTRY).decode()
        finally:
            provider.shutdown()

    types, labels = {}, {}
    for family in text_string_to_metric_families(anyio.run(scrape)):
        for sample in family.samples:
            if sample.name.startswith("topaz_"):
                types[sample.name] = family.type
                known = labels.setdefault(sample.name, {})
                for label, value in sample.labels.items():
                    known.setdefault(label, set()).add(value)
    return Exported(types, labels)


@attrs.define
class Query:
    """A walk through a query that asserts that the query can have a result."""

    exported: Exported
    names: set[str] = attrs.Factory(set)

    def labels(self, text):
        """Return the labels of the result."""
        text = text.replace("$__rate_interval", "5m")
        assert "$__" not in text
        return self._of(promql.parse(text), None)

    def _of(self, expr, function):
        labels = None
        match expr:
            case promql.NumberLiteral():
                pass
            case promql.ParenExpr() | promql.UnaryExpr():
                labels = self._of(expr.expr, function)
            case promql.MatrixSelector():
                labels = self._of(expr.vector_selector, function)
            case promql.VectorSelector():
                labels = self._selected(expr, function)
            case promql.Call():
                labels = self._called(expr)
            case promql.AggregateExpr():
                labels = self._aggregated(expr, self._of(expr.expr, function))
            case promql.BinaryExpr():
                left, right = (self._of(e, function) for e in (expr.lhs, expr.rhs))
                assert not (expr.modifier and expr.modifier.matching), "not needed yet"
                # Otherwise no series on one side matches a series on the other.
                assert None in (left, right) or left == right, str(expr)
                labels = right if left is None else left
            case _:
                raise AssertionError(f"{type(expr)} is not known here: {expr}")
        return labels

    def _selected(self, expr, function):
        name = expr.name
        assert name in self.exported.labels, f"{name} is not exported"
        self.names.add(name)
        counts = self.exported.types[name] in {"counter", "histogram"}
        assert counts == (function in {"rate", "increase"}), f"{function} of {name}"
        known = self.exported.labels[name]
        for matcher in expr.matchers.matchers:
            if matcher.name in {*SCRAPE, "pool"}:
                assert matcher.value == f"${matcher.name}"
                assert matcher.op == promql.MatchOp.Re
                continue
            assert matcher.name in known, f"{name} has no {matcher.name}"
            assert any(re.fullmatch(matcher.value, v) for v in known[matcher.name])
        return {*known, *SCRAPE}

    def _called(self, expr):
        inner = [self._of(arg, expr.func.name) for arg in expr.args]
        (labels,) = (of for of in inner if of is not None)
        if expr.func.name == "histogram_quantile":
            assert "le" in labels, f"no buckets: {expr}"
            return labels - {"le"}
        return labels

    @staticmethod
    def _aggregated(expr, inner):
        if expr.modifier is None:
            return set()
        named = set(expr.modifier.labels)
        assert named <= inner, f"no {named - inner}: {expr}"
        by = expr.modifier.type == promql.AggModifierType.By
        return named if by else inner - named


@pytest.mark.parametrize("title, target", TARGETS)
def test_each_dashboard_query_uses_exported_metrics(exported, title, target):
    labels = Query(exported).labels(target["expr"])
    shown = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
    assert set(shown) == labels, "the legend distinguishes the series"
    # For a pool without a name the legend must not be empty.
    assert re.sub(r"\{\{pool\}\}|\s", "", target["legendFormat"])


@pytest.mark.parametrize("alert", RULES)
def test_each_alert_uses_exported_metrics_and_can_name_its_source(exported, alert):
    rule = RULES[alert]
    labels = Query(exported).labels(rule["expr"])
    assert {"job", "instance", "pool"} <= labels
    for text in rule["annotations"].values():
        assert set(re.findall(r"\$labels\.(\w+)", text)) <= labels
        reasons = set(re.findall(r'eq \$labels\.reason "(\w+)"', text))
        assert reasons <= exported.labels["topaz_pool_connect_failures_total"]["reason"]


@pytest.mark.parametrize(
    "spoiled",
    [
        "rate(topaz_pool_timeout_total[5m])",
        "topaz_pool_timeouts_total",
        "rate(topaz_pool_connections_total[5m])",
        "sum by (reason) (topaz_pool_waiting)",
        'topaz_pool_connections_total{state="used"}',
        'topaz_pool_waiting{state="idle"}',
        'topaz_pool_waiting{job="$job"}',
        "topaz_pool_streams_in_use / sum by (pool) (topaz_pool_streams_max)",
        "histogram_quantile(0.9, sum(rate(topaz_pool_hold_time_seconds_bucket[5m])))",
        "histogram_quantile(0.9, rate(topaz_pool_hold_time_seconds_count[5m]))",
        "rate(topaz_pool_timeouts_total[$__range])",
    ],
)
def test_a_query_without_a_possible_result_is_detected(exported, spoiled):
    with pytest.raises(AssertionError):
        Query(exported).labels(spoiled)


def test_the_dashboard_shows_every_metric(exported):
    query = Query(exported)
    for _, target in TARGETS:
        query.labels(target["expr"])
    suffix = re.compile("_(bucket|sum|count)$")
    shown = {suffix.sub("", name) for name in query.names}
    assert shown == {suffix.sub("", name) for name in exported.types}


def test_each_variable_is_used_and_filled_from_exported_labels(exported):
    for name in VARIABLES.keys() - {"datasource"}:
        variable = VARIABLES[name]
        asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
        assert asked[2] == name in Query(exported).labels(asked[1])
        assert variable["query"]["query"] == variable["definition"]
        # This includes series without that label, as of a pool without a name.
        assert variable["includeAll"]
        assert variable["allValue"] == ".*"
        assert variable["refresh"]
    assert VARIABLES["datasource"]["query"] == "prometheus"
    used = set(re.findall(r"\$\{?(?!__)(\w+)", json.dumps(DASHBOARD)))
    assert used == set(VARIABLES)


def test_every_query_uses_the_selected_data_source():
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    queries = [v for v in VARIABLES.values() if v["type"] == "query"]
    for asking in [*GRAPHS, *(target for _, target in TARGETS), *queries]:
        assert asking["datasource"] == chosen
    for panel in GRAPHS:
        refs = [target["refId"] for target in panel["targets"]]
        assert len(refs) == len(set(refs)) > 0


def test_each_panel_has_a_description_and_a_unit():
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert len(titles) == len(set(titles))
    assert all(panel["description"] for panel in PANELS)
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in GRAPHS)
    texts = [panel["description"] for panel in PANELS]
    texts += [text for rule in RULES.values() for text in rule["annotations"].values()]
    for text in texts:
        assert set(re.findall(r'"([A-Z][^"]+)"', text)) <= set(titles)


def test_panels_do_not_overlap():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    for a, b in itertools.combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
    assert all(0 <= p["x"] < p["x"] + p["w"] <= 24 for p in places)


def test_the_expected_alerts_exist_and_explain_themselves():
    assert RULES.keys() >= {
        "TopazPoolSaturated",
        "TopazPoolAcquireSlow",
        "TopazPoolConnectFailures",
        "TopazPoolNoHealthyConnection",
        "TopazChecksFailing",
        "TopazFallbackAllows",
        "TopazFallbackDenies",
        "TopazCircuitOpen",
        "TopazDenialsJump",
    }
    for rule in RULES.values():
        assert rule["for"]
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert rule["annotations"].keys() == {"summary", "description"}
