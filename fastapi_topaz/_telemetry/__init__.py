"""What a pool tells OpenTelemetry: its metrics, and a span for each check."""

from fastapi_topaz._telemetry._metrics import PoolMetrics, Source
from fastapi_topaz._telemetry._tracing import CheckSpan, Tracing, propagated


__all__ = ["CheckSpan", "PoolMetrics", "Source", "Tracing", "propagated"]
