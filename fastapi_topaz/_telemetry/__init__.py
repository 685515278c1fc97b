"""What a pool tells OpenTelemetry: its metrics, and a span for each check."""
