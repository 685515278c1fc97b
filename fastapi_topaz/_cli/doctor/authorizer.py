"""The checks that make gRPC calls: the Authorizer, its limits, clock and policies."""

from __future__ import annotations

import contextlib
import datetime as dt
import math
import re
import statistics
import time
from typing import TYPE_CHECKING, Any, Final

import anyio
import attrs
import grpc
import grpc.aio
from anyio import to_thread
from google.protobuf.json_format import MessageToDict

from fastapi_topaz._authorizer.calls import AuthorizerCalls
from fastapi_topaz._cli.doctor.findings import found
from fastapi_topaz._cli.doctor.policies import missing_policy, root_finding
from fastapi_topaz._http2.opening import NativeOpener
from fastapi_topaz._rpc.credentials import CredentialedConnection
from fastapi_topaz._rpc.statuses import (
    Ending,
    LateCredentials,
    ending,
    lacks_status,
    status_number,
)
from fastapi_topaz.exceptions import (
    ConnectFailed,
    ConnectionLost,
    CredentialsFailed,
)


if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator

    from fastapi_topaz._cli.doctor.context import Checkup, Settings
    from fastapi_topaz._cli.doctor.findings import Finding
    from fastapi_topaz._cli.doctor.tls import Route
    from fastapi_topaz._http2.addresses import Address
    from fastapi_topaz._rpc.connection import RpcConnection
    from fastapi_topaz._rpc.metadata import Metadata
    from fastapi_topaz._rpc.target import Target


__all__ = ["ask_authorizer", "call_fault"]


SAMPLES: Final = 10
"""The calls that measure the latency."""

SLOW: Final = 0.1
"""Seconds of the median latency above which there is a warning."""

MOST_SKEW: Final = 10.0
"""Seconds between the clocks above which there is a problem."""

FEWEST_STREAMS: Final = 2

PAUSES: Final = (0.01, 0.05, 0.2)
"""Seconds before a call is sent again that the server refused to process."""

_NOW = "x = time.now_ns()"
"""A query of Rego for the time of the server, in nanoseconds since 1970."""

_HTTP_STATUS = re.compile(r"HTTP status: (\d{3})\b")

_FAILED: Final = (grpc.aio.AioRpcError, ConnectionLost, CredentialsFailed)
"""The errors of a call."""

_UNDECIDED = {3, 13}
"""INVALID_ARGUMENT: the decision is undefined. INTERNAL: it is not a boolean."""


class Calls(AuthorizerCalls):
    """The calls of the Authorizer on a connection that no pool owns."""

    __slots__ = ("_connection",)

    def __init__(self, connection: RpcConnection) -> None:
        self._connection = connection

    async def _send(
        self, method: str, request: bytes, timeout: float | None, metadata: Metadata
    ) -> bytes:
        pauses = iter(PAUSES)
        while True:
            try:
                return await self._connection.call(
                    method, request, timeout=timeout, metadata=metadata
                )
            except grpc.aio.AioRpcError as error:
                # With a limit of one stream, the last call may not be over yet for the
                # server, so it refuses the next one.
                pause = next(pauses, None)
                if pause is None or ending(error) is not Ending.REFUSED_STREAM:
                    raise
            await anyio.sleep(pause)


class _Unverified(NativeOpener):
    """Opens connections with these TLS settings instead of those of the target."""

    def __init__(self, target: Target, context: ssl.SSLContext | None) -> None:
        super().__init__(target)
        self._lenient = context

    def _context(self) -> ssl.SSLContext | None:
        return self._lenient


async def ask_authorizer(checkup: Checkup, address: Address, route: Route) -> None:
    """Ask the Authorizer at *address*, and add what is found."""
    limit = checkup.settings.timeout
    target = _pinned(checkup, address, route)
    opener = (
        NativeOpener(target) if route.is_trusted else _Unverified(target, route.context)
    )
    try:
        connection: Any = await opener.open(limit)
    except ConnectFailed as error:
        kind = "server-goaway" if "GOAWAY" in str(error) else "connection-lost"
        if error.reason == "timeout":
            kind = "server-silent"
        said = "the server speaks HTTP/2, but no connection for calls became ready"
        checkup.add(found(kind, said, address.text))
        return
    if target.credentials is not None:
        connection = CredentialedConnection(connection, target)
    async with _running(connection):
        await _ask(checkup, address.text, connection, route)


def _pinned(checkup: Checkup, address: Address, route: Route) -> Target:
    """Return the target at *address*, with credentials only for a trusted server."""
    target, endpoint = checkup.target, checkup.endpoint
    assert target is not None  # noqa: S101
    assert endpoint is not None  # noqa: S101
    authority = target.authority or target.server_name
    if authority is None and not endpoint.addresses:
        authority = endpoint.authority  # the name, and not the address that it has
    pinned = attrs.evolve(target, url=address.text, authority=authority)
    if not target.insecure:
        name = target.server_name or endpoint.certificate_host
        pinned = attrs.evolve(pinned, server_name=name)
    if route.is_trusted:
        return pinned
    # The server is not known to be the right one.
    return attrs.evolve(pinned, metadata=(), credentials=None)


@contextlib.asynccontextmanager
async def _running(connection: Any) -> AsyncIterator[None]:
    """Run the tasks of *connection*, if it has any, and close it at the end."""
    async with anyio.create_task_group() as tasks:
        if (run := getattr(connection, "run", None)) is not None:
            tasks.start_soon(run)
        try:
            yield
        finally:
            with anyio.CancelScope(shield=True):
                await connection.close(0)
            tasks.cancel_scope.cancel()


async def _ask(checkup: Checkup, where: str, connection: Any, route: Route) -> None:
    settings, calls = checkup.settings, Calls(connection)
    try:
        info = await calls.info(timeout=settings.timeout)
    except _FAILED as error:
        checkup.add(_stream_limit(connection, settings, where))
        checkup.add(call_fault(error, settings, where))
        return
    version = info.version or "an unknown version"
    checkup.add(found("authorizer", f"Topaz {version} answers", where))
    checkup.add(await _latency(calls, settings, where))
    checkup.add(_stream_limit(connection, settings, where))
    is_sent = route.is_trusted and checkup.has_credentials
    if settings.has_secrets and not is_sent:
        said = "the credentials were not sent, so they and the policies are not checked"
        checkup.add(found("not-checked", said, where))
        return
    checkup.add(await _clock(calls, settings, where))
    checkup.add(*await _policies(calls, settings, where))


def call_fault(error: Exception, settings: Settings, where: str) -> Finding:
    """Return the finding for a failed call, without the details of the server."""
    if isinstance(error, CredentialsFailed | LateCredentials):
        late = f"credentials returned no metadata within {settings.timeout:g} s"
        said = late if isinstance(error, LateCredentials) else str(error)
        return found("credentials-failed", said, where)
    if not isinstance(error, grpc.aio.AioRpcError):
        return found("connection-lost", "the connection ended during a call", where)
    return _status_fault(error, settings, where)


def _status_fault(
    error: grpc.aio.AioRpcError, settings: Settings, where: str
) -> Finding:
    how, code = ending(error), error.code()
    if how is Ending.TIMED_OUT or code is grpc.StatusCode.DEADLINE_EXCEEDED:
        said = f"no answer to a call within {settings.timeout:g} s"
        return found("authorizer-silent", said, where)
    if how is Ending.NO_STATUS:
        status = _HTTP_STATUS.search(error.details() or "")
        said = f"HTTP status {status[1]}" if status else "no gRPC status"
        said = f"the answer is not one of gRPC: {said}"
        return found("proxy-without-topaz", said, where)
    if lacks_status(error) or how in {Ending.GOAWAY, Ending.NOT_SENT}:
        return found("connection-lost", "the call was cut off", where)
    if code is grpc.StatusCode.UNAUTHENTICATED and settings.has_secrets:
        key = "this API key" if settings.api_key else "these metadata"
        said = f"a call with {key} was answered with UNAUTHENTICATED"
        return found("api-key-refused", said, where)
    said = f"a call was answered with {code.name}"
    return found(_STATUSES.get(code, "authorizer-error"), said, where)


_STATUSES: Final = {
    grpc.StatusCode.PERMISSION_DENIED: "permission-denied",
    grpc.StatusCode.UNAUTHENTICATED: "api-key-missing",
    grpc.StatusCode.UNAVAILABLE: "authorizer-unavailable",
    grpc.StatusCode.UNIMPLEMENTED: "not-an-authorizer",
}


async def _latency(calls: Calls, settings: Settings, where: str) -> Finding:
    took: list[float] = []
    for _ in range(SAMPLES):
        began = time.perf_counter()
        try:
            await calls.info(timeout=settings.timeout)
        except _FAILED as error:
            return call_fault(error, settings, where)
        took.append(time.perf_counter() - began)
    median, most = statistics.median(took), max(took)
    said = f"a call takes {_ms(median)} (median of {len(took)}), at most {_ms(most)}"
    return found("latency-high" if median > SLOW else "latency", said, where)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def _stream_limit(connection: Any, settings: Settings, where: str) -> Finding:
    limit = connection.max_streams
    said = (
        "the server does not limit the calls at once on a connection"
        if math.isinf(limit) or limit >= 2**31
        else f"the server allows {limit:g} calls at once on a connection"
    )
    if limit >= max(settings.streams, FEWEST_STREAMS):
        return found("stream-limit", said, where)
    if limit < settings.streams:
        said += f", but the pool should use {settings.streams}"
    return found("stream-limit-low", said, where)


async def _clock(calls: Calls, settings: Settings, where: str) -> Finding:
    """Compare the clocks. The server tells its time as the answer to a query."""
    began = time.perf_counter()
    try:
        answer = await calls.query(query=_NOW, timeout=settings.timeout)
        theirs = int(MessageToDict(answer.response)["result"][0]["bindings"]["x"])
    except (*_FAILED, *_UNREADABLE):
        return found("clock-unknown", "the server does not tell its time", where)
    took = time.perf_counter() - began
    ours = (settings.now() - dt.timedelta(seconds=took / 2)).timestamp()
    skew = theirs / 1e9 - ours
    if abs(skew) - took <= MOST_SKEW:
        most = abs(skew) + took + 0.05  # so that it is never shown as 0.0
        return found("clock", f"the clocks differ by at most {most:.1f} s", where)
    side = "ahead of" if skew > 0 else "behind"
    said = f"the clock of the server is {abs(skew):.0f} s {side} this machine"
    return found("clock-skew", said, where)


_UNREADABLE = (KeyError, IndexError, TypeError, ValueError)


async def _policies(calls: Calls, settings: Settings, where: str) -> list[Finding]:
    findings, packages = [], set[str]()
    instance = _instance(settings)
    try:
        listed = await calls.list_policies(timeout=settings.timeout, **instance)
    except _FAILED as error:
        fault = call_fault(error, settings, where)
        if fault.id in {"not-an-authorizer", "authorizer-error"}:
            said = "the server does not list its policies"
            fault = found("policies-unknown", said, where)
        findings.append(fault)
    else:
        paths = (each.package_path for each in listed.result)
        packages = {each.removeprefix("data.") for each in paths} - {""}
        findings.append(root_finding(packages, settings.policy_root, where))
    path = settings.policy_path
    if path is None:
        return findings
    try:
        await calls.decisions(policy_path=path, timeout=settings.timeout, **instance)
    except _FAILED as error:
        if status_number(error) in _UNDECIDED:
            # In a thread, because there may be thousands of packages.
            fault = await to_thread.run_sync(missing_policy, packages, path, where)
        else:
            fault = call_fault(error, settings, where)
        return [*findings, fault]
    return [*findings, found("policy", f"{path} decides `allowed`", where)]


def _instance(settings: Settings) -> dict[str, Any]:
    names = ("policy_instance_name", "policy_instance_label")
    return {name: getattr(settings, name) for name in names}
