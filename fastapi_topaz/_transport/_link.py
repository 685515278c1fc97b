"""
One gRPC channel that owns one TCP connection.

Everything here runs on the asyncio loop that opened the link: the application's
own, or that of the loop thread when the application runs on trio.

Three habits of grpc.aio are cured here, because none of them may reach a caller:

- Awaiting a call replaces the CancelledError that anyio threw by one of its own,
  which `move_on_after` and `fail_after` do not recognise (grpc#43502). So a caller
  awaits a plain future that the call's own task completes.
- `Call.cancel()` leaks about a kilobyte of native memory each time (grpc#43360).
  Cancelling the call in the core alone, and letting its task end by itself, does
  not.
- Closing a channel raises CancelledError in whoever awaits a call, although nobody
  cancelled them. Here that is `ConnectionLost`.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from fastapi_topaz import _fork
from fastapi_topaz._transport._base import Verdict
from fastapi_topaz._transport._failures import (
    connect_failed,
    connect_timed_out,
    is_cut_off,
    is_refused_stream,
)
from fastapi_topaz._transport._peer import Peer
from fastapi_topaz.exceptions import ConnectionLost


if TYPE_CHECKING:
    from fastapi_topaz._options import AuthorizerOptions
    from fastapi_topaz._transport._base import Metadata


__all__ = ["PROBE", "Link", "root_certificates"]


# Every Topaz answers it, in its default configuration even without credentials;
# grpc.health.v1 is served on another port.
PROBE = "/aserto.authorizer.v2.Authorizer/Info"

# An answer with any other status was sent by the server itself: it is alive.
_NOT_ALIVE = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})

# Each channel resolves the name anew and goes to a random one of its addresses: one
# after the other would bring all connections of all workers to the first.
_SPREAD = '{"loadBalancingConfig":[{"pick_first":{"shuffleAddressList":true}}]}'

# Nobody here has cancelled a call that ends CANCELLED: a server does that as it stops.
_GOING = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})

LAST_CALLS = 1.0
"""Seconds that calls which were cut off get to end by themselves."""

_MAX_INT = 2**31 - 1
_READY = grpc.ChannelConnectivity.READY
_FAILED = grpc.ChannelConnectivity.TRANSIENT_FAILURE


def _version() -> str:
    try:
        return importlib.metadata.version("fastapi-topaz")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return "unknown"


def _channel_options(timeout: float) -> list[tuple[str, Any]]:
    return [
        # Channels to one target share one TCP connection otherwise.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.service_config", _SPREAD),
        # Tells the peer; its traces of events would cost more than the connecting.
        ("grpc.enable_channelz", 1),
        ("grpc.max_channel_trace_event_memory_per_node", 0),
        # Despite its name this is how long gRPC lets one attempt take. A little
        # less than our own timeout, so that gRPC still gets to say the reason.
        (
            "grpc.min_reconnect_backoff_ms",
            min(_MAX_INT, max(100, int(timeout * 950))),
        ),
        # A channel that lost its connection makes a new one by itself; it must
        # not wait the default of up to 2 minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # grpc-go, and so Topaz, answers pings more often than every 5 minutes
        # with GOAWAY "too_many_pings". Any value also sets TCP_USER_TIMEOUT to
        # the keepalive timeout, which finds a cut network under calls in 10 s.
        ("grpc.keepalive_time_ms", 310_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 0),
        # The pool decides which idle connection goes.
        ("grpc.client_idle_timeout_ms", _MAX_INT),
        # gRPC would send a loopback sidecar through http_proxy.
        ("grpc.enable_http_proxy", 0),
        ("grpc.primary_user_agent", f"fastapi-topaz/{_version()}"),
    ]


def root_certificates(options: AuthorizerOptions) -> bytes | None:
    """
    Return the PEM text of `cert_file_path`, or None for gRPC's own roots.

    Raises:
        ValueError: The file cannot be read, or holds no certificate.
    """
    if options.cert_file_path is None:
        return None
    wrong = (
        f"cert_file_path must be a readable PEM file, got {options.cert_file_path!r}"
    )
    try:
        with open(options.cert_file_path, "rb") as file:  # noqa: PTH123
            pem = file.read()
    except OSError as error:
        raise ValueError(f"{wrong}: {error.strerror}") from error
    if b"-----BEGIN CERTIFICATE-----" not in pem:
        raise ValueError(f"{wrong}, which holds no certificate")
    return pem


def _open_channel(options: AuthorizerOptions, timeout: float) -> grpc.aio.Channel:
    arguments = _channel_options(timeout)
    if options.insecure:
        return grpc.aio.insecure_channel(options.url, options=arguments)
    credentials = grpc.ssl_channel_credentials(root_certificates(options))
    return grpc.aio.secure_channel(options.url, credentials, options=arguments)


async def _until_ready(channel: grpc.aio.Channel, options: AuthorizerOptions) -> None:
    state = channel.get_state(try_to_connect=True)
    while state is not _READY:
        if state is _FAILED:
            # gRPC's own retries are not waited for: the pool paces attempts.
            await _raise_reason(channel, options)
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)


async def _raise_reason(channel: grpc.aio.Channel, options: AuthorizerOptions) -> None:
    # The reason is in the status of a call, and nowhere else. The call is not awaited
    # itself: what it raises would keep it, and with it the closed channel, which then
    # goes on connecting for as long as somebody keeps the error.
    call: Any = channel.unary_unary(PROBE)(b"", timeout=1)
    try:
        await asyncio.wait([call._call_response])  # noqa: SLF001
    except asyncio.CancelledError:
        Link.abandon(call)
        raise
    unavailable = await call.code() is grpc.StatusCode.UNAVAILABLE
    details = await call.details() or ""
    del call
    if unavailable:  # else it has connected meanwhile
        raise connect_failed(details, options)


class Link:
    """
    One gRPC channel to an authorizer; the `Connection` of a pool on asyncio.

    Strictly private.
    """

    def __init__(
        self, channel: grpc.aio.Channel, peer: Peer, options: AuthorizerOptions
    ) -> None:
        self._channel = channel
        self._peer = peer
        self.peer = peer.address()
        self._target = options.url
        self._metadata = options.metadata
        self._loop = asyncio.get_running_loop()
        self._methods: dict[str, Any] = {}
        # Calls in flight by the task that carries them.
        self._calls: dict[asyncio.Task[Any], Any] = {}
        self._closed = False
        self._lost = False
        self._quiet: asyncio.Event | None = None

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<Link to {self._target} {state} calls={len(self._calls)}>"

    @classmethod
    async def open(
        cls,
        options: AuthorizerOptions,
        timeout: float,
    ) -> Link:
        """
        Connect, and return when the connection is ready for calls.

        Raises:
            ConnectFailed: It did not become ready within *timeout* seconds.
            ValueError: The certificate file cannot be read.
        """
        channel, peer = Peer.of_new(lambda: _open_channel(options, timeout))
        _fork.watch(channel)
        try:
            async with asyncio.timeout(timeout):
                await _until_ready(channel, options)
        except BaseException as error:  # noqa: BLE001  (raised again)
            await channel.close()
            _fork.forget(channel)
            # The pool keeps its last error; its frames must not keep the channel.
            del channel
            if isinstance(error, TimeoutError):
                raise connect_timed_out(options, timeout) from None
            raise error.with_traceback(None)  # noqa: B904  (the same error)
        return cls(channel, peer, options)

    # -- calls ------------------------------------------------------------------

    def start(
        self, method: str, request: bytes, timeout: float | None, metadata: Metadata
    ) -> Any:
        """
        Begin a call and return gRPC's call object.

        Bytes in, bytes out: grpc.aio swallows what a serializer raises, and sends
        an empty request.

        Raises:
            ConnectionLost: The link is closed.
        """
        if self._closed:
            raise self.lost(method)
        # Noted, because the call makes the channel connect anew: it may be READY again
        # before anybody asks.
        self.is_lost()
        begin = self._methods.get(method)
        if begin is None:
            begin = self._methods[method] = self._channel.unary_unary(method)
        call: Any = begin(
            request,
            timeout=timeout,
            metadata=(*self._metadata, *metadata) if metadata else self._metadata,
        )
        task = call._call_response  # noqa: SLF001
        self._calls[task] = call
        task.add_done_callback(self._ended)
        return call

    def finish(self, call: Any, method: str) -> bytes:
        """
        Return the response of *call*, which has ended; callable from any thread.

        Raises:
            grpc.aio.AioRpcError: The call ended with another status than OK.
            ConnectionLost: The link was closed under the call.
        """
        # A finished call answers its first step; running it by hand needs no loop.
        # The frames of an error live as long as somebody keeps it, and a call in
        # one of them keeps its socket open, even that of a closed channel.
        try:
            call.__await__().send(None)
        except StopIteration as stop:
            if stop.value is not None:
                return bytes(stop.value)
            # OK without a message, which gRPC lets pass: nothing was answered.
        except grpc.aio.AioRpcError as error:
            del call
            raise error.with_traceback(None)  # noqa: B904  (the same error)
        except asyncio.CancelledError:
            pass
        except KeyError:
            # A status that gRPC 1.80 does not know; later ones call it UNKNOWN.
            pass
        del call
        raise self.lost(method)

    @staticmethod
    def abandon(call: Any) -> None:
        """Cancel *call* on the wire; its task ends by itself."""
        call._cancel("cancelled by the caller")  # noqa: SLF001

    async def call(
        self,
        method: str,
        request: bytes,
        *,
        timeout: float | None,
        metadata: Metadata,
    ) -> bytes:
        """Make one call and return its response."""
        call = self.start(method, request, timeout, metadata)
        ended = self._loop.create_future()

        def wake(_task: object) -> None:
            if not ended.done():
                ended.set_result(None)

        call._call_response.add_done_callback(wake)  # noqa: SLF001
        try:
            await ended
            return self.finish(call, method)
        except asyncio.CancelledError:
            self.abandon(call)
            raise
        finally:
            del call

    def judge(self, error: BaseException, /) -> Verdict | None:
        """Return what *error*, raised by a call, says of the connection itself."""
        if isinstance(error, ConnectionLost):
            return Verdict.BROKEN
        if not isinstance(error, grpc.aio.AioRpcError):
            return None
        code = error.code()
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Verdict.SILENT
        if code not in _GOING or is_refused_stream(error):
            return Verdict.ANSWERED
        if is_cut_off(error) or self.is_lost():
            return Verdict.BROKEN
        return Verdict.UNAVAILABLE

    def is_lost(self) -> bool:
        """
        Say whether the socket is gone, or the server has said GOAWAY.

        The channel would make a new connection by itself, perhaps to another server. It
        is asked and not watched: with a watch under way, a process forked from this one
        crashes at random in gRPC, also if it never uses it.
        """
        # Never set to False: on trio two threads do this.
        if self._closed or self._channel.get_state() is not _READY:
            self._lost = True
        return self._lost

    def look_closely(self) -> None:
        """
        Find out whether the channel went on to another socket unseen.

        After GOAWAY the calls that were under way may bring it there at once.
        """
        if self._peer.is_gone():
            self._lost = True

    def _ended(self, task: asyncio.Task[Any]) -> None:
        del self._calls[task]
        if self._quiet is not None and not self._calls:
            self._quiet.set()

    def lost(self, method: str) -> ConnectionLost:
        """Return the error of a call whose connection was closed."""
        return ConnectionLost(
            f"the call {method} to {self._target} ended without an answer: the "
            "connection was closed under it, or the server broke the protocol"
        )

    # -- probing and closing ----------------------------------------------------

    async def probe(self, timeout: float, /) -> None:
        """
        Ask the authorizer for its version; any answer of its own will do.

        Raises:
            grpc.aio.AioRpcError: No answer within *timeout* seconds, or no
                connection.
            ConnectionLost: The link was closed meanwhile.
        """
        try:
            await self.call(PROBE, b"", timeout=timeout, metadata=())
        except grpc.aio.AioRpcError as error:
            if error.code() in _NOT_ALIVE and not is_refused_stream(error):
                raise

    async def close(self, grace: float, /) -> None:
        """Close the channel after *grace* seconds, or once its calls have ended."""
        self._closed = True
        try:
            if grace > 0 and self._calls:
                self._quiet = asyncio.Event()
                try:
                    async with asyncio.timeout(grace):
                        await self._quiet.wait()
                except TimeoutError:
                    pass
        finally:
            # Before the channel closes, because close() cancels what it finds in
            # flight in the way that leaks.
            for call in self._calls.values():
                call._cancel("connection closed")  # noqa: SLF001
            await self._channel.close()
            if self._calls:
                # Else their last events reach another loop, once this one is closed.
                await asyncio.wait(list(self._calls), timeout=LAST_CALLS)
            _fork.forget(self._channel)
