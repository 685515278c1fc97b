"""
The parts of the demo: policies, an application, an HTTP server and the traffic.

    httpx --HTTP--> uvicorn or hypercorn --> FastAPI --gRPC--> authorizer
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import socket
import ssl
import threading
import time
from collections import Counter
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import anyio
import attrs
import httpx
import uvicorn
from fastapi import Depends, FastAPI, Request

from fastapi_topaz._app.guards import require_policy_auto
from fastapi_topaz._authorizer.options import Identity, IdentityType


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastapi_topaz._app.config import TopazConfig
    from fastapi_topaz.testing import Check, Policies

    Health: TypeAlias = dict[str, Any]
    Started: TypeAlias = Future["Running"]


__all__ = [
    "PATIENCE",
    "SHOTS",
    "DemoFailed",
    "Shot",
    "Tally",
    "application",
    "http_client",
    "identity_of",
    "policies",
    "send",
    "serving",
]


logger = logging.getLogger(__name__)

USERS: Final = frozenset({"alice", "bob"})
OWNERS: Final = {"1": "alice", "2": "bob"}
# Time limit in seconds for steps that normally take milliseconds.
PATIENCE: Final = 30.0


class DemoFailed(Exception):  # noqa: N818
    """The demo could not run. The message says why."""


# -- the policies -------------------------------------------------------------------


def policies(root: str) -> Policies:
    """Return the policies below *root*: all users may read, only owners may delete."""

    def known(check: Check) -> bool:
        return check.identity.value in USERS

    def owner(check: Check) -> bool:
        return known(check) and OWNERS.get(check.resource["id"]) == check.identity.value

    return {
        f"{root}.GET.documents": known,
        f"{root}.GET.documents.__id": known,
        f"{root}.DELETE.documents.__id": owner,
    }


def identity_of(request: Request) -> Identity:
    """
    Return the identity in the header `x-user`, without a check.

    A real application verifies a token instead.
    """
    user = request.headers.get("x-user")
    # MANUAL, because Topaz looks up SUB in its directory, which may be empty.
    return Identity(IdentityType.MANUAL, user) if user else Identity(IdentityType.NONE)


def application(config: TopazConfig) -> FastAPI:
    """Return the guarded application. Its DELETE route deletes nothing."""
    app = FastAPI(lifespan=config.lifespan)
    guarded = [Depends(require_policy_auto(config))]

    @app.get("/documents", dependencies=guarded)
    async def documents() -> list[str]:
        return sorted(OWNERS)

    @app.get("/documents/{id}", dependencies=guarded)
    async def document(id: str) -> dict[str, str]:  # noqa: A002
        return {"id": id}

    @app.delete("/documents/{id}", dependencies=guarded)
    async def delete(id: str) -> dict[str, str]:  # noqa: A002
        return {"deleted": id}

    @app.get("/health")
    async def health() -> dict[str, object]:
        pool_status = config.connection_pool.status()
        return {
            "status": "ok" if pool_status.healthy else "degraded",
            "connection_pool": {
                "total": pool_status.total,
                "idle": pool_status.idle,
                "busy": pool_status.busy,
                "healthy": pool_status.healthy_connections,
                "max": pool_status.max_connections,
                "streams": pool_status.streams_in_use,
                "streams_max": pool_status.streams_max,
            },
        }

    return app


# -- the server ---------------------------------------------------------------------


@attrs.frozen
class Running:
    """A running server: its URL, and a function that stops it from any thread."""

    url: str
    stop: Callable[[], object]


@contextlib.contextmanager
def serving(app: FastAPI, backend: str) -> Iterator[str]:
    """
    Serve *app* on a free port of 127.0.0.1, in a thread of its own.

    The backend `asyncio` is uvicorn, `trio` is hypercorn.

    Yields:
        The URL, once the application has started and the server listens.

    Raises:
        DemoFailed: The server did not start, or did not stop.
    """
    started: Started = Future()
    serve = _hypercorn if backend == "trio" else _uvicorn
    thread = threading.Thread(
        target=_guarded,
        args=(serve, app, started),
        name="demo-server",
        # After a second Ctrl-C, Python must exit without waiting for this thread.
        daemon=True,
    )
    thread.start()
    try:
        try:
            url = started.result(PATIENCE).url
        except TimeoutError:
            raise DemoFailed("the server did not start in time") from None
        yield url
    finally:
        # If the start timed out, this stops the server as soon as it listens.
        started.add_done_callback(_stop)
        thread.join(PATIENCE)
    if thread.is_alive():
        raise DemoFailed("the server did not stop in time")


def _stop(started: Started) -> None:
    if started.exception() is None:
        started.result().stop()


def _guarded(
    serve: Callable[[FastAPI, Started], None], app: FastAPI, started: Started
) -> None:
    try:
        serve(app, started)
    except BaseException as error:
        logger.exception("the server broke down")
        if not started.done():
            missing = isinstance(error, ModuleNotFoundError)
            failed = error if missing else DemoFailed("the server did not start")
            started.set_exception(failed)


def _uvicorn(app: FastAPI, started: Started) -> None:
    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            stop = partial(setattr, self, "should_exit", True)
            started.set_result(Running(url, stop))

    config = uvicorn.Config(
        app,
        loop="asyncio",
        ws="auto",
        lifespan="on",
        log_config=None,
        access_log=False,
        # Longer than the demo, so that no connection closes during a request.
        timeout_keep_alive=3600,
        timeout_graceful_shutdown=3,
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # asyncio does not set this for accepted sockets. Without it, answers take
        # 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        Server(config).run(sockets=[listener])


def _hypercorn(app: FastAPI, started: Started) -> None:
    # Imported here, because the asyncio backend does not need them.
    import hypercorn.trio  # noqa: PLC0415
    import trio.testing  # noqa: PLC0415
    from hypercorn.config import Config  # noqa: PLC0415

    config = Config()
    config.bind = "127.0.0.1:0"
    config.backlog = 2048
    config.errorlog = logging.getLogger("hypercorn.error")
    config.keep_alive_timeout = 3600
    config.keep_alive_max_requests = 2**31

    async def main() -> None:
        stop = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def leave() -> None:
            # The server may have failed before.
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(stop.set)

        serve = partial(
            hypercorn.trio.serve,
            app,  # type: ignore[arg-type]
            config,
            shutdown_trigger=stop.wait,
        )
        async with trio.open_nursery() as nursery:
            urls = await nursery.start(serve)
            # If the lifespan fails, hypercorn still starts, and only then fails. So
            # wait until that would have happened.
            await trio.testing.wait_all_tasks_blocked()
            started.set_result(Running(urls[0], leave))

    trio.run(main)


# -- the traffic --------------------------------------------------------------------


@attrs.frozen
class Shot:
    """One request, and whether the demo's policies allow it."""

    method: Literal["GET", "DELETE"]
    path: str
    user: str | None
    allowed: bool


SHOTS: Final = (
    Shot("GET", "/documents/1", "alice", allowed=True),
    Shot("GET", "/documents", "bob", allowed=True),
    Shot("DELETE", "/documents/1", "bob", allowed=False),
    Shot("GET", "/documents/2", "alice", allowed=True),
    Shot("GET", "/documents/2", "mallory", allowed=False),
    Shot("DELETE", "/documents/2", "bob", allowed=True),
    Shot("GET", "/documents/1", "bob", allowed=True),
    Shot("GET", "/documents", None, allowed=False),
)


@attrs.define
class Tally:
    """The outcomes and latencies of the requests."""

    allowed: int = 0
    denied: int = 0
    failures: Counter[str] = attrs.Factory(Counter)
    latencies: list[float] = attrs.Factory(list)
    elapsed: float = 0.0
    halfway: Health | None = None
    afterwards: Health | None = None

    @property
    def failed(self) -> int:
        """Requests without an answer, or with an unexpected answer."""
        return self.failures.total()

    @property
    def requests(self) -> int:
        """The number of requests that ended."""
        return self.allowed + self.denied + self.failed

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.elapsed if self.elapsed else 0.0

    def percentile(self, share: float) -> float:
        """Return the latency in seconds that *share* of the answers do not exceed."""
        if not self.latencies:
            return math.nan
        ordered = sorted(self.latencies)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    def count(self, status: int, expected: int | None) -> None:
        """Count an answer. If *expected* is None, both decisions are accepted."""
        if status not in {200, 403}:
            self.failures[f"answered {status}"] += 1
        elif expected not in {None, status}:
            self.failures[f"answered {status} instead of {expected}"] += 1
        elif status == 200:
            self.allowed += 1
        else:
            self.denied += 1


async def send(
    url: str,
    *,
    requests: int,
    concurrency: int,
    strict: bool,
    progress: Callable[[], object],
) -> Tally:
    """
    Send *requests* requests, *concurrency* at once, and count the answers.

    With *strict*, the policies are the demo's own, so each outcome is known. The
    function calls *progress* after every answer. If all of the first requests fail,
    it stops, because an unreachable authorizer would cost minutes.
    """
    tally = Tally()
    shots = enumerate(itertools.islice(itertools.cycle(SHOTS), requests))
    enough = max(concurrency, 10)

    async def work() -> None:
        # Each worker has its own client. A shared httpx client checks every
        # connection of its pool for every request, and the demo would measure that.
        async with http_client(url) as client:
            for number, shot in shots:
                if number == requests // 2:
                    tally.halfway = await _health(client)
                await _fire(client, shot, tally, strict=strict)
                progress()
                if tally.failed == tally.requests >= enough:
                    return

    begin = time.perf_counter()
    async with anyio.create_task_group() as workers:
        for _ in range(min(concurrency, requests)):
            workers.start_soon(work)
    tally.elapsed = time.perf_counter() - begin
    async with http_client(url) as client:
        tally.afterwards = await _health(client)
    return tally


def http_client(url: str) -> httpx.AsyncClient:
    """Return an HTTP client for the server of the demo."""
    return httpx.AsyncClient(
        base_url=url,
        timeout=PATIENCE,
        # TLS is never used. This context is much cheaper than the default, which loads
        # all root certificates.
        verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        # A proxy from the environment cannot reach 127.0.0.1 of this machine.
        trust_env=False,
    )


async def _fire(
    client: httpx.AsyncClient, shot: Shot, tally: Tally, *, strict: bool
) -> None:
    headers = {"x-user": shot.user} if shot.user else {}
    begin = time.perf_counter()
    try:
        response = await client.request(shot.method, shot.path, headers=headers)
    except httpx.HTTPError as error:
        tally.failures[f"not answered: {error!r}"] += 1
        return
    tally.latencies.append(time.perf_counter() - begin)
    expected = 200 if shot.allowed else 403
    tally.count(response.status_code, expected if strict else None)


async def _health(client: httpx.AsyncClient) -> Health | None:
    try:
        response = await client.get("/health")
        health: Health = response.raise_for_status().json()
    except httpx.HTTPError:
        return None
    return health
