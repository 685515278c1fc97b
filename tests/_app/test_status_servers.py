"""Test that an open status page does not hold up the end of a server."""

from __future__ import annotations

import json
import signal

import httpx
import pytest

from kit.workers.authorizer import Authorizer
from kit.workers.served import PATIENCE, Served


pytestmark = pytest.mark.real_clock

# The servers wait for running responses: uvicorn without a limit, the others as long as
# they are told to.
GUNICORN = [
    *("gunicorn", "-k", "uvicorn_worker.UvicornWorker", "-b", "127.0.0.1:0"),
    *("--no-control-socket", "--graceful-timeout", "3600"),
]
UVICORN = ["uvicorn", "--port", "0", "--no-access-log"]
UVLOOP = [*UVICORN, "--loop", "uvloop", "--timeout-worker-healthcheck", "30"]
HYPERCORN = ["hypercorn", "-b", "127.0.0.1:0", "--graceful-timeout", "3600"]
SERVERS = {
    "gunicorn": [*GUNICORN, "--workers", "2"],
    "uvicorn": [*UVICORN, "--loop", "asyncio"],
    "uvicorn with workers": [*UVLOOP, "--workers", "2"],
    "hypercorn on trio": [*HYPERCORN, "--worker-class", "trio"],
    # One worker: the parent of several kills the others once the first one has ended.
    "hypercorn on asyncio": HYPERCORN,
}
MARKS = {
    "uvicorn": (),
    # grpcio does not run on trio.
    "hypercorn on trio": pytest.mark.native,
}


@pytest.mark.parametrize(
    "server",
    [pytest.param(name, marks=MARKS.get(name, pytest.mark.slow)) for name in SERVERS],
)
def test_sigterm_ends_an_open_stream_in_order(server, tmp_path):
    with (
        Authorizer() as authorizer,
        Served(
            [*SERVERS[server], "kit.workers.watched:app"],
            tmp_path / "log",
            TOPAZ_URL=authorizer.url,
            POOL=json.dumps({"max_connections": 2}),
            CHECK_TIMEOUT="60",
        ) as served,
    ):
        served.asked_first()
        url = f"http://127.0.0.1:{served.port}/topaz/events"
        # One connection for one request: hypercorn on trio also waits for idle ones.
        with httpx.stream("GET", url, timeout=PATIENCE) as response:
            chunks = response.iter_text()
            assert "retry" in next(chunks)
            served.send(signal.SIGTERM)
            # An error if the server cuts the stream off.
            rest = "".join(chunks)
        assert rest.endswith("\n\n")
        served.ended()
        assert "Traceback" not in served.log
