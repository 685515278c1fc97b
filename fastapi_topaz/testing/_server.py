"""
Runs the server of the embedded authorizer in a thread with its own event loop.

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
# Time limit in seconds for steps that normally take milliseconds.
_PATIENCE = 30.0
# Time limit in seconds for sockets to close. After a graceful stop, the last bytes are
# sent in this time.
_FLUSH = 0.5
# Time limit in seconds for cancelled calls to end.
_LAST_CALLS = 2.0
# If no new call starts for this time in seconds, gRPC has started all received calls.
_QUIET = 0.02


@attrs.define(eq=False)
class ServerThread:
    """
    A server that is started and stopped once.

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
        """Whether the caller runs in this thread, as a policy does."""
        return threading.current_thread() is self._thread

    def start(self, port: int) -> int:
        """Start the server on *port* and return it. 0 means any free port."""
        started: Future[int] = Future()
        self._thread = threading.Thread(
            target=self._run,
            args=(port, started),
            name="embedded-authorizer",
            # If a test does not stop the server, Python must still be able to exit.
            daemon=True,
        )
        self._thread.start()
        try:
            return started.result(_PATIENCE)
        except OSError:
            self._thread.join(_PATIENCE)
            raise

    def stop(self, grace: float) -> None:
        """Close all sockets and wait until the thread ends."""
        thread, asked = self._thread, self._grace
        assert thread is not None  # noqa: S101
        assert asked is not None  # noqa: S101
        self.call(lambda: asked.set_result(grace))
        thread.join(grace + _PATIENCE)

    def call(self, action: Callable[[], _T]) -> _T:
        """Run *action* in the server's thread and return its result."""
        assert self._loop is not None  # noqa: S101

        async def act() -> _T:
            return action()

        done = asyncio.run_coroutine_threadsafe(act(), self._loop)
        return done.result(_PATIENCE)

    def _run(self, port: int, started: Future[int]) -> None:
        # Always this loop, which is known to work, not the loop that the test uses.
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(self._serve(port, started))

    async def _serve(self, port: int, started: Future[int]) -> None:
        self._loop = asyncio.get_running_loop()
        self._grace = self._loop.create_future()
        try:
            # The relay opens first. Otherwise the private port could be this port.
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
            # If more than 1,000 requests wait for Python, the gRPC core cancels some
            # at random. This happens if a test keeps the interpreter busy.
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
        # gRPC gives its events to any running loop of the process. An event of a closed
        # loop causes an error there. So all calls must end before this loop closes.
        if await _others(_LAST_CALLS) or was_busy:
            await asyncio.sleep(_QUIET)

    async def _drain(self, server: grpc.aio.Server, grace: float) -> None:
        """
        Stop gracefully, as a Go server does: each started call gets *grace* to end.

        gRPC for Python cancels calls that it has received but not started. So the
        relay first stops forwarding requests, and gRPC starts all received calls. The
        held requests come after the last stream that GOAWAY names. So clients know
        that they may safely repeat them.
        """
        deadline = asyncio.get_running_loop().time() + grace
        self.relay.drain()
        begun = -1
        # Polls, because there is no event for "no further call starts".
        while begun != (begun := sum(self.service.calls.values())):  # noqa: ASYNC110
            await asyncio.sleep(_QUIET)
        going = asyncio.ensure_future(server.stop(grace))
        await _others(deadline - asyncio.get_running_loop().time(), going)
        # server.stop(grace) waits until clients acknowledge GOAWAY. The relay holds
        # these acknowledgements, so it must be stopped at once.
        await server.stop(None)
        await going
        if not self.relay.frozen:
            await self._emptied()

    async def _emptied(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH):
                await self.relay.empty()


async def _others(patience: float, *but: asyncio.Future[Any]) -> bool:
    """
    Wait for all other tasks of this loop, which are the calls.

    Args:
        patience: Time limit in seconds.
        but: Tasks to leave out.

    Returns:
        Whether there were any.
    """
    others = asyncio.all_tasks() - {asyncio.current_task(), *but}
    if others:
        await asyncio.wait(others, timeout=max(0.0, patience))
    return bool(others)
