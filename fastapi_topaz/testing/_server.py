"""
One life of the embedded authorizer: a thread with a loop with a server in it.

    client --TCP--> Relay --TCP--> grpc.aio server --> AuthorizerService
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import grpc
import grpc.aio
from aserto.authorizer.v2.authorizer_pb2_grpc import add_AuthorizerServicer_to_server


if TYPE_CHECKING:
    from collections.abc import Callable

    from ._certs import Certificates
    from ._relay import Relay
    from ._service import AuthorizerService


__all__ = ["ServerThread"]


_T = TypeVar("_T")
# Seconds for what takes milliseconds unless the machine is in trouble.
_PATIENCE = 30.0
# Seconds that closing sockets get, after a graceful stop for the last bytes.
_FLUSH = 0.5
# Seconds that cancelled calls get to end.
_LAST_CALLS = 2.0
# Seconds without a new call after which gRPC is taken to have begun all it has.
_QUIET = 0.02


@attrs.define(eq=False)
class ServerThread:
    """
    A server from its start to its stop; used once.

    Strictly private.
    """

    relay: Relay
    service: AuthorizerService
    certificates: Certificates | None
    max_concurrent_streams: int | None
    _thread: threading.Thread | None = None
    _loop: asyncio.AbstractEventLoop | None = None
    _grace: asyncio.Future[float] | None = None

    @property
    def is_current(self) -> bool:
        """Whether the caller is code that runs in this thread, such as a policy."""
        return threading.current_thread() is self._thread

    def start(self, port: int) -> int:
        """Listen on *port*, 0 for any free one, and return it."""
        started: Future[int] = Future()
        self._thread = threading.Thread(
            target=self._run,
            args=(port, started),
            name="embedded-authorizer",
            # A server that nobody stopped must not keep Python alive.
            daemon=True,
        )
        self._thread.start()
        try:
            return started.result(_PATIENCE)
        except OSError:
            self._thread.join(_PATIENCE)
            raise

    def stop(self, grace: float) -> None:
        """Close everything and wait for the end of the thread."""
        thread, asked = self._thread, self._grace
        assert thread is not None  # noqa: S101
        assert asked is not None  # noqa: S101
        self.call(lambda: asked.set_result(grace))
        thread.join(grace + _PATIENCE)

    def call(self, action: Callable[[], _T]) -> _T:
        """Do *action* in the thread and wait for it."""
        assert self._loop is not None  # noqa: S101

        async def act() -> _T:
            return action()

        done = asyncio.run_coroutine_threadsafe(act(), self._loop)
        return done.result(_PATIENCE)

    def _run(self, port: int, started: Future[int]) -> None:
        # Whatever loops the test uses: this one is known to work.
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(self._serve(port, started))

    async def _serve(self, port: int, started: Future[int]) -> None:
        self._loop = asyncio.get_running_loop()
        self._grace = self._loop.create_future()
        try:
            # First, or the private port below might happen to be this one.
            port = self.relay.open(port)
            server = self._server()
            target = self._private_port(server)
            await server.start()
            self.relay.serve(target)
        except Exception as error:  # noqa: BLE001
            self.relay.close_door()
            started.set_exception(error)
            return
        started.set_result(port)
        await self._shut(server, await self._grace)

    def _server(self) -> grpc.aio.Server:
        options: list[tuple[str, Any]] = [
            ("grpc.so_reuseport", 0),
            # Beyond 1,000 requests that Python has not fetched yet, the core answers
            # with CANCELLED at random. A test that keeps the interpreter busy in its
            # own thread gets there.
            ("grpc.server.max_pending_requests", 2**30),
            ("grpc.server.max_pending_requests_hard_limit", 2**30),
        ]
        if self.max_concurrent_streams is not None:
            options.append(("grpc.max_concurrent_streams", self.max_concurrent_streams))
        server = grpc.aio.server(options=options)
        self.service.stopping = False
        add_AuthorizerServicer_to_server(self.service, server)
        return server

    def _private_port(self, server: grpc.aio.Server) -> int:
        if self.certificates is None:
            return int(server.add_insecure_port("127.0.0.1:0"))
        pair = (self.certificates.private_key, self.certificates.chain)
        credentials = grpc.ssl_server_credentials([pair])
        return int(server.add_secure_port("127.0.0.1:0", credentials))

    async def _shut(self, server: grpc.aio.Server, grace: float) -> None:
        self.service.stopping = True
        was_busy = self.service.streams > 0
        self.relay.close_door()
        if grace > 0:
            await self._drain(server, grace)
        self.relay.abort()
        await server.stop(None)
        await self._emptied()
        # gRPC hands its events to whichever loop in the process is awake, and one
        # that belongs to a closed loop is an error there: let all calls end first.
        if await _others(_LAST_CALLS) or was_busy:
            await asyncio.sleep(_QUIET)

    async def _drain(self, server: grpc.aio.Server, grace: float) -> None:
        """
        Stop as a server in Go does: no call is lost that it was not given time for.

        gRPC for Python cancels what it has received and not begun. So it gets no
        more to receive, and begins what it has. What the relay holds back is beyond
        the last stream that GOAWAY names, so clients know that it is safe to repeat.
        """
        deadline = asyncio.get_running_loop().time() + grace
        self.relay.drain()
        begun = -1
        # No event would tell: it is nothing happening that is waited for.
        while begun != (begun := sum(self.service.calls.values())):  # noqa: ASYNC110
            await asyncio.sleep(_QUIET)
        going = asyncio.ensure_future(server.stop(grace))
        await _others(deadline - asyncio.get_running_loop().time(), going)
        # It would wait for clients to acknowledge GOAWAY, which the relay holds.
        await server.stop(None)
        await going
        if not self.relay.frozen:
            await self._emptied()

    async def _emptied(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH):
                await self.relay.empty()


async def _others(patience: float, *but: asyncio.Future[Any]) -> bool:
    """Wait for the calls, the other tasks of this loop; tell if there were any."""
    others = asyncio.all_tasks() - {asyncio.current_task(), *but}
    if others:
        await asyncio.wait(others, timeout=max(0.0, patience))
    return bool(others)
