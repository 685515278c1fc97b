"""Fixtures: a meter provider for Prometheus."""

from __future__ import annotations

import pytest
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider


@pytest.fixture
def provider():
    provider = MeterProvider([PrometheusMetricReader()])
    yield provider
    provider.shutdown()
