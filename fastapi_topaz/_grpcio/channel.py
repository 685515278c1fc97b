"""
How a channel is opened and becomes ready for calls, or why it does not.

Each channel owns one TCP connection: see `connection`.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Final

import anyio
import grpc
import grpc.aio

from fastapi_topaz._grpcio.calls import Calls
from fastapi_topaz._grpcio.failures import connect_failed, hung_up
from fastapi_topaz._rpc.certificates import client_pair, root_certificates
from fastapi_topaz._rpc.names import host_of, split_port
from fastapi_topaz._version import VERSION


if TYPE_CHECKING:
    from fastapi_topaz._rpc.target import Target


__all__ = ["READY", "check_names", "open_channel", "until_ready"]


# Each channel resolves the name again, and tries the addresses in random order.
# Otherwise all connections of all workers would go to the first address.
_SPREAD = '{"loadBalancingConfig":[{"pick_first":{"shuffleAddressList":true}}]}'

_MAX_INT = 2**31 - 1
READY: Final = grpc.ChannelConnectivity.READY
_IDLE: Final = grpc.ChannelConnectivity.IDLE
_FAILED: Final = grpc.ChannelConnectivity.TRANSIENT_FAILURE
_SHUTDOWN: Final = grpc.ChannelConnectivity.SHUTDOWN

_FIRST_PAUSE: Final = 0.0005
_LONGEST_PAUSE: Final = 0.01
"""
Seconds between two looks at a channel that connects.

gRPC shows a failed attempt for 0.08 seconds, before the next one.
"""
_STARTED: Final = 0.2
"""Seconds within which a channel begins to connect."""


def _channel_options(timeout: float) -> list[tuple[str, Any]]:
    return [
        # Otherwise channels to one target share one TCP connection.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.service_config", _SPREAD),
        # The pool retries. gRPC's own retries have no pause and no limit if a server
        # sends GOAWAY on each connection: memory grows by hundreds of MiB a second.
        ("grpc.enable_retries", 0),
        # Despite its name, this is the time limit of one attempt. It is shorter than
        # the timeout of the pool, so that gRPC can report the reason.
        (
            "grpc.min_reconnect_backoff_ms",
            int(min(_MAX_INT, max(100, timeout * 950))),
        ),
        # A channel that lost its connection makes a new one by itself. The default
        # pause is up to 2 minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # If pings come more often than every 5 minutes, grpc-go, which Topaz uses,
        # answers GOAWAY "too_many_pings". Any value also sets TCP_USER_TIMEOUT to the
        # keepalive timeout. So a cut network is detected under calls within 10 s.
        ("grpc.keepalive_time_ms", 310_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 0),
        # The pool decides which idle connection is closed.
        ("grpc.client_idle_timeout_ms", _MAX_INT),
        # gRPC would send calls to a loopback sidecar through http_proxy.
        ("grpc.enable_http_proxy", 0),
        ("grpc.primary_user_agent", f"fastapi-topaz/{VERSION}"),
    ]


def _target_options(target: Target) -> list[tuple[str, Any]]:
    limit = target.max_message_bytes
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", limit),
        # `GrpcConnection.call` refuses a larger request before.
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
    # If no file descriptor is left, gRPC aborts the process: its first channel opens
    # /dev/urandom. This raises OSError instead.
    os.close(os.open(os.devnull, os.O_RDONLY))
    arguments = [*_channel_options(timeout), *_target_options(target)]
    if target.insecure:
        return grpc.aio.insecure_channel(target.url, options=arguments)
    certificate, key = client_pair(target) or (None, None)
    credentials = grpc.ssl_channel_credentials(
        root_certificates(target), private_key=key, certificate_chain=certificate
    )
    return grpc.aio.secure_channel(target.url, credentials, options=arguments)


async def until_ready(channel: grpc.aio.Channel, target: Target) -> None:
    """
    Return when *channel* is ready for calls. It connects once.

    This looks at the state again and again. If `wait_for_state_change` of grpc.aio is
    cancelled, gRPC later reports to its event loop, which may be closed by then.

    Raises:
        ConnectFailed: It cannot become ready, and why.
    """
    state = channel.get_state(try_to_connect=True)
    pause, waited, has_started = _FIRST_PAUSE, 0.0, state is not _IDLE
    while state is not READY:
        if state is _FAILED:
            # gRPC would try again. The pool decides when to do that.
            await _raise_reason(channel, target)
        await asyncio.sleep(pause)
        waited, pause = waited + pause, min(2 * pause, _LONGEST_PAUSE)
        # A channel that is IDLE again has lost its connection. gRPC pauses only after
        # an attempt that failed. If this function connected again, a server that hangs
        # up at once would get hundreds of connects a second.
        state = channel.get_state(try_to_connect=False)
        has_started = has_started or state is not _IDLE or waited > _STARTED
        if state is _SHUTDOWN or (state is _IDLE and has_started):
            raise hung_up(target)


async def _raise_reason(channel: grpc.aio.Channel, target: Target) -> None:
    # Only the status of a call has the reason.
    calls = Calls()
    try:
        outcome = await calls.outcome(channel.unary_unary(target.probe)(b"", timeout=1))
    except asyncio.CancelledError:
        with anyio.CancelScope(shield=True):
            await calls.until_reported()
        raise
    # Else it has connected meanwhile. UNKNOWN is the status of calls on a channel that
    # gRPC makes of a target that it cannot read. The state of that channel never
    # changes.
    if (
        isinstance(outcome, grpc.aio.AioRpcError)
        and outcome.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN}
        and channel.get_state() is not READY
    ):
        raise connect_failed(outcome.details() or "", target)
