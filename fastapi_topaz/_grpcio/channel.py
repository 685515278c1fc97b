"""
How a channel is set up and becomes ready for calls, or why it does not.

All of this is for a channel that owns one TCP connection: see `connection`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from fastapi_topaz._grpcio.call import call_class, detect_call_class
from fastapi_topaz._grpcio.calls import LAST_CALLS
from fastapi_topaz._grpcio.failures import connect_failed, hung_up
from fastapi_topaz._rpc.certificates import client_pair, root_certificates
from fastapi_topaz._rpc.names import host_of, split_port
from fastapi_topaz._version import VERSION


if TYPE_CHECKING:
    from fastapi_topaz._rpc.target import Target


__all__ = [
    "READY",
    "close_without_loop",
    "open_channel",
    "until_ready",
    "until_reported",
]


# Each channel resolves the name anew and goes to a random one of its addresses: one
# after the other would bring all connections of all workers to the first.
_SPREAD = '{"loadBalancingConfig":[{"pick_first":{"shuffleAddressList":true}}]}'

_MAX_INT = 2**31 - 1
READY = grpc.ChannelConnectivity.READY
_ENDED = {grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.SHUTDOWN}
_FAILED = grpc.ChannelConnectivity.TRANSIENT_FAILURE


def _channel_options(timeout: float) -> list[tuple[str, Any]]:
    return [
        # Channels to one target share one TCP connection otherwise.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.service_config", _SPREAD),
        # The pool retries. gRPC's own retries have no pause and no limit if a server
        # sends GOAWAY on each connection: memory grows by hundreds of MiB a second.
        ("grpc.enable_retries", 0),
        # Tells the peer, and in its traces of events why each address failed.
        ("grpc.enable_channelz", 1),
        ("grpc.max_channel_trace_event_memory_per_node", 4096),
        # Despite its name this is how long gRPC lets one attempt take. A little
        # less than our own timeout, so that gRPC still gets to say the reason.
        (
            "grpc.min_reconnect_backoff_ms",
            int(min(_MAX_INT, max(100, timeout * 950))),
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
        ("grpc.primary_user_agent", f"fastapi-topaz/{VERSION}"),
    ]


def _target_options(target: Target) -> list[tuple[str, Any]]:
    limit = target.max_message_bytes
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", limit),
        # A larger request is refused before: see `Calls`.
        ("grpc.max_send_message_length", limit),
    ]
    name = target.server_name
    if target.authority is not None:
        options.append(("grpc.default_authority", target.authority))
        # Otherwise the certificate would have to be for the authority.
        name = name or host_of(target.url)
    if name is not None and not target.insecure:
        options.append(("grpc.ssl_target_name_override", name))
    return options


def check_names(target: Target) -> None:
    """
    Check that gRPC can send the `authority` of *target*.

    With TLS, gRPC refuses calls whose authority is another host than the name that the
    certificate must be for, unless the authority is a host name without a port.

    Raises:
        ValueError: It cannot.
    """
    if target.authority is None or target.insecure:
        return
    host, port = split_port(target.authority) or ("", "")
    name = target.server_name or host_of(target.url)
    if host.strip("[]").lower() == name.lower():
        return
    if port or host.startswith("["):
        raise ValueError(
            f"authority={target.authority!r} needs transport='native': with TLS, "
            "gRPC sends another host than that of the certificate only as a host name "
            f"without a port; the certificate must be for {name!r}"
        )


def open_channel(target: Target, timeout: float) -> grpc.aio.Channel:
    """Return a new channel, which is to be ready within *timeout* seconds."""
    # Without a file descriptor gRPC aborts the process: its first channel opens
    # /dev/urandom. Here it is an error, which the pool knows what to do with.
    os.close(os.open(os.devnull, os.O_RDONLY))
    arguments = [*_channel_options(timeout), *_target_options(target)]
    if target.insecure:
        channel = grpc.aio.insecure_channel(target.url, options=arguments)
    else:
        certificate, key = client_pair(target) or (None, None)
        credentials = grpc.ssl_channel_credentials(
            root_certificates(target), private_key=key, certificate_chain=certificate
        )
        channel = grpc.aio.secure_channel(target.url, credentials, options=arguments)
    detect_call_class(channel)
    return channel


def close_without_loop(channel: Any) -> None:
    """Close *channel*, which has no calls in flight, when no event loop runs."""
    # close() of grpc.aio asks for the tasks of the running loop before 1.84. There is
    # none, which is an error.
    with contextlib.suppress(AttributeError):  # else its destructor closes it
        channel._channel.close()  # noqa: SLF001


async def until_ready(channel: grpc.aio.Channel, target: Target) -> None:
    """
    Return when *channel* is ready for calls.

    Raises:
        ConnectFailed: It is not to be had, and why.
    """
    state = channel.get_state(try_to_connect=True)
    while state is not READY:
        if state is _FAILED:
            # gRPC's own retries are not waited for: the pool paces attempts.
            await _raise_reason(channel, target)
        await _until_changed(channel, state)
        # A channel that is IDLE again has lost its connection. gRPC pauses only after
        # an attempt that failed. If this function connected again, a server that hangs
        # up at once would get hundreds of connects a second.
        state = channel.get_state(try_to_connect=False)
        if state in _ENDED:
            raise hung_up(target)


async def until_reported(operation: asyncio.Future[Any]) -> None:
    """
    Wait until gRPC's core has reported the end of *operation*, which was abandoned.

    If its loop is closed before the report, another loop logs "Event loop is closed".
    The report takes about a millisecond. This waits for `LAST_CALLS` seconds at most,
    also if it is cancelled, and raises the cancellation afterwards.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + LAST_CALLS
    cancelled: asyncio.CancelledError | None = None
    while not operation.done() and (left := until - loop.time()) > 0:
        try:
            await asyncio.wait([operation], timeout=left)
        except asyncio.CancelledError as error:
            cancelled = error
    try:
        if cancelled is not None:
            raise cancelled
    finally:
        # Its traceback holds this frame, which would hold the error.
        del cancelled


async def _until_changed(
    channel: grpc.aio.Channel, state: grpc.ChannelConnectivity
) -> None:
    # If this coroutine of grpc.aio is cancelled, it forgets the operation, but the core
    # reports its end all the same. So nothing awaits it: the future it waits for is
    # taken out. A task would not do, because asyncio.run cancels all tasks.
    watch: Any = channel.wait_for_state_change(state)
    try:
        changed = watch.send(None)
    except StopIteration:
        return  # it has changed already
    changed._asyncio_future_blocking = False  # noqa: SLF001
    try:
        await asyncio.wait([changed])
    except asyncio.CancelledError:
        # Closing ends the operation.
        await channel.close()
        await until_reported(changed)
        raise
    finally:
        watch.close()


async def _raise_reason(channel: grpc.aio.Channel, target: Target) -> None:
    # The reason is in the status of a call, and nowhere else. No frame may hold the
    # call when this raises: with it an error would keep the closed channel, which then
    # goes on connecting for as long as somebody keeps the error.
    ended = asyncio.get_running_loop().create_future()
    call = call_class()(
        channel, target.probe, b"", 1, (), lambda _: ended.set_result(None)
    )
    try:
        await asyncio.wait([ended])
        outcome = call.outcome()
    except asyncio.CancelledError:
        call.cancel("cancelled by the caller")
        await until_reported(ended)
        raise
    except GeneratorExit:  # the loop was closed
        call.cancel("event loop closed")
        raise
    finally:
        del call
    # Else it has connected meanwhile. UNKNOWN is how calls end on the channel that gRPC
    # makes of a target it cannot read, and that one never changes its state.
    if (
        isinstance(outcome, grpc.aio.AioRpcError)
        and outcome.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN}
        and channel.get_state() is not READY
    ):
        raise connect_failed(outcome.details() or "", target)
