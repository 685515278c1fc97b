"""Test the server of the demo, and its counts."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from concurrent.futures import Future

import anyio
import anyio.lowlevel
import httpx
import pytest
from fastapi import FastAPI
from rich.console import Console

from fastapi_topaz._cli import demo as _demo
from fastapi_topaz._cli import demo_command as _demo_command
from kit.backends import asyncio_only
from kit.logs import lines_of


# Far longer than a test takes.
PATIENCE = 20.0


@contextlib.contextmanager
def in_the_end(event):
    """Set *event* at the end."""
    try:
        yield
    finally:
        event.set()


@contextlib.contextmanager
def demo_threads():
    """Check that no demo server is left at the end."""
    yield
    for thread in threading.enumerate():
        if thread.name == "demo-server":
            thread.join(PATIENCE)
            assert not thread.is_alive()


def app_that_waits(*, to_start=None, to_stop=None):
    """Return an application that waits for these events to start and to stop."""

    async def until(event):
        if event is not None:
            await anyio.to_thread.run_sync(event.wait, PATIENCE)

    @contextlib.asynccontextmanager
    async def lifespan(_app):
        await until(to_start)
        yield
        await until(to_stop)

    return FastAPI(lifespan=lifespan)


@pytest.mark.real_clock
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_server_that_starts_too_late_is_abandoned_and_stops(backend, monkeypatch):
    monkeypatch.setattr(_demo, "PATIENCE", 0.01)
    may = threading.Event()
    with (
        demo_threads(),
        in_the_end(may),
        pytest.raises(_demo.DemoFailed, match="did not start in time"),
        _demo.serving(app_that_waits(to_start=may), backend),
    ):
        pytest.fail("it cannot have started")


@pytest.mark.real_clock
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_server_that_does_not_stop_is_reported(backend, monkeypatch):
    may = threading.Event()

    def serve_and_stop():
        with _demo.serving(app_that_waits(to_stop=may), backend) as url:
            assert httpx.get(f"{url}/nothing", trust_env=False).status_code == 404
            monkeypatch.setattr(_demo, "PATIENCE", 0.01)

    with demo_threads(), in_the_end(may):
        with pytest.raises(_demo.DemoFailed, match="did not stop in time"):
            serve_and_stop()
        assert "demo-server" in {thread.name for thread in threading.enumerate()}


def test_a_server_that_fails_later_has_started(caplog):
    started = Future()
    running = _demo.Running("http://127.0.0.1:1", stop=lambda: None)

    def serve(_app, future):
        future.set_result(running)
        raise OSError("no space left")

    _demo._guarded(serve, FastAPI(), started)

    assert started.result() is running
    assert lines_of(caplog, logging.ERROR) == ["the server broke down"]


@pytest.mark.real_clock
@asyncio_only
async def test_a_demo_without_its_server_stops_and_reports_it(free_tcp_port):
    advanced = []
    tally = await _demo.send(
        f"http://127.0.0.1:{free_tcp_port}",
        requests=1000,
        concurrency=5,
        strict=True,
        progress=lambda: advanced.append(1),
    )
    # As many requests as are in progress when the tenth has failed.
    assert 10 <= tally.failed == tally.requests == len(advanced) < 20
    ((failure, times),) = tally.failures.most_common()
    assert failure.startswith("not answered: ConnectError")
    assert times == tally.failed
    assert math.isnan(tally.percentile(0.99))
    assert (tally.halfway, tally.afterwards) == (None, None)

    console = Console(width=100)
    with console.capture() as capture:
        console.print(_demo_command._results(tally, None), _demo_command._pool(tally))
    assert "n/a" in capture.get()
    assert "afterwards" not in capture.get()


@pytest.mark.parametrize(
    "status, expected, counted",
    [
        (200, 200, (1, 0, {})),
        (403, 403, (0, 1, {})),
        (200, None, (1, 0, {})),
        (403, None, (0, 1, {})),
        (200, 403, (0, 0, {"answered 200 instead of 403": 1})),
        (403, 200, (0, 0, {"answered 403 instead of 200": 1})),
        (503, None, (0, 0, {"answered 503": 1})),
    ],
)
def test_an_answer_is_counted_by_its_status(status, expected, counted):
    tally = _demo.Tally()
    tally.count(status, expected)
    assert (tally.allowed, tally.denied, dict(tally.failures)) == counted
    assert tally.requests == 1
