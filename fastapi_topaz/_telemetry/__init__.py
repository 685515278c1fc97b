"""OpenTelemetry: the metrics of a pool, and a span for each check."""
