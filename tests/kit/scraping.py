"""The metrics of this package, as Prometheus sees them."""

from __future__ import annotations

from prometheus_client import generate_latest


def scrape(registry, prefix="topaz_pool"):
    """Return the samples by name and by this package's labels."""
    samples = {}
    for line in generate_latest(registry).decode().splitlines():
        if line.startswith(prefix):
            series, value = line.rsplit(" ", 1)
            name, _, labels = series.partition("{")
            ours = [
                label
                for label in labels.rstrip("}").split(",")
                if label and not label.startswith("otel_scope")
            ]
            key = name + (f"{{{','.join(ours)}}}" if ours else "")
            samples[key] = float(value)
    return samples
