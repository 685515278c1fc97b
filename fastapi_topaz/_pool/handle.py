"""What `acquire()` gives: a handle that works until it is released, and no longer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi_topaz._authorizer.calls import AuthorizerCalls
from fastapi_topaz._authorizer.options import seconds
from fastapi_topaz._pool.connector import is_metadata_key
from fastapi_topaz._redaction import boundary
from fastapi_topaz._slips import LEASE_FORM, NotCopied
from fastapi_topaz._telemetry.tracing import propagated
from fastapi_topaz.exceptions import ConnectionLost, PoolMisuse


if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi_topaz._pool.connector import Metadata
    from fastapi_topaz._pool.open_pool import Runtime
    from fastapi_topaz._pool.state.entry import Lease


__all__ = ["PooledConnection"]


EVER = 10.0 * 365 * 86400
"""Seconds. gRPC overflows on deadlines far beyond this, and ends the call at once."""


class PooledConnection(AuthorizerCalls, NotCopied):
    """
    A connection on loan from a pool, with the calls of the authorizer.

    Each `acquire()` gives a new one, also where it lends the same connection again:
    after its release every use of it raises `PoolMisuse`.
    Identity, metadata and timeout travel with each call and leave nothing behind.
    """

    __slots__ = ("__weakref__", "_lease", "_pool", "_runtime")

    _copy_form = "acquire() another one"

    # What a pool is made of is no part of the public types.
    def __init__(self, pool: object, runtime: Any, lease: Any) -> None:
        self._pool = pool
        self._runtime: Runtime = runtime
        self._lease: Lease | None = lease

    def __repr__(self) -> str:
        state = "released" if self._lease is None else "leased"
        return f"<PooledConnection to {self._runtime.target} {state}>"

    def __del__(self) -> None:
        # Nobody can give it back any more. Not here: garbage is collected at any
        # moment, in the midst of whatever the pool does, and in any thread.
        try:
            lease = self._lease
        except AttributeError:  # __init__ was not run
            return
        if lease is not None:
            self._lease = None
            _abandon(self._runtime, lease, self)

    if not TYPE_CHECKING:  # see `_slips`

        def __aenter__(self):  # noqa: ANN204
            if self._lease is not None:
                # The only reference may be the one that this statement dropped.
                self._lease.refused = True
            del self
            raise TypeError(
                "`await pool.acquire()` returned a lease, which is no context manager: "
                f"{LEASE_FORM}"
            )

        def __aexit__(self, *exc):  # noqa: ANN002, ANN204
            """Do nothing: `__aenter__` always raises."""

        __enter__, __exit__ = __aenter__, __aexit__

    @property
    def waited(self) -> float:
        """
        How long `acquire()` waited for it, in seconds; 0.0 if it did not have to.

        Raises:
            PoolMisuse: The lease was released.
        """
        return self._held().waited

    @property
    def connection(self) -> Any:
        """
        The object that the pool's connector made.

        Raises:
            PoolMisuse: The lease was released.
            ConnectionLost: The pool was closed, and its grace is over.
        """
        lease = self._held()
        # A leased connection is closed only by close(), when its grace is over.
        if lease.entry is None or lease.entry.connection is None:
            raise ConnectionLost(
                f"{self._runtime.label} was closed, and this connection to "
                f"{self._runtime.target} with it"
            )
        return lease.entry.connection

    def _held(self) -> Lease:
        if self._lease is None:
            raise PoolMisuse(
                "this connection was released to its pool; acquire() another one"
            )
        return self._lease

    @boundary
    async def call(
        self,
        method: str,
        request: Any,
        *,
        request_serializer: Callable[[Any], bytes] | None = None,
        response_deserializer: Callable[[bytes], Any] | None = None,
        timeout: float | None = None,
        metadata: Metadata = (),
    ) -> Any:
        """
        Make one unary-unary call of any gRPC service the connection reaches.

        Args:
            method: The full name, as `/package.Service/Method`.
            request: The message, or bytes without a serializer.
            request_serializer: Makes bytes of the request.
            response_deserializer: Makes the response from bytes.
            timeout: Seconds until the call fails with DEADLINE_EXCEEDED; None for
                no limit.
            metadata: Pairs of str, sent besides those of the authorizer options.

        Raises:
            grpc.aio.AioRpcError: The call ended with another status than OK.
            ConnectionLost: The connection was closed under the call.
            PoolMisuse: The lease was released before.
            TypeError: The pool's connector makes connections without gRPC calls.
        """
        _check_call(method, metadata)
        data = request if request_serializer is None else request_serializer(request)
        if not isinstance(data, bytes):
            raise TypeError(
                "request must be bytes, or request_serializer must make bytes of it, "
                f"got {type(data).__name__}"
            )
        response = await self._send(method, data, timeout, metadata)
        return response_deserializer(response) if response_deserializer else response

    async def _send(
        self, method: str, request: bytes, timeout: float | None, metadata: Metadata
    ) -> bytes:
        # The usual case first; what each call does costs more than it seems, because by
        # the next one it has left the processor's caches.
        if type(timeout) is not float or not 0 < timeout < EVER:
            timeout = _limit(timeout)
        connection = self.connection
        # Not isinstance(): for a runtime protocol it costs more than the lease.
        rpc = getattr(connection, "call", None)
        if rpc is None:
            raise TypeError(
                f"{connection!r} carries no gRPC calls: use the object itself, which "
                "is the attribute `connection`"
            )
        assert self._lease is not None  # noqa: S101  (connection would have raised)
        entry = self._lease.entry
        assert entry is not None  # noqa: S101
        try:
            response: bytes = await rpc(
                method, request, timeout=timeout, metadata=propagated(metadata)
            )
        except Exception as error:
            self._runtime.judge(entry, error)
            raise
        entry.proven_at = self._runtime.now()
        entry.answered = True
        return response


def _limit(timeout: float | None) -> float | None:
    if timeout is None or seconds("timeout", timeout, infinite=False) > EVER:
        return None
    return timeout


def _check_call(method: object, metadata: object) -> None:
    if not isinstance(method, str):
        raise TypeError(
            f"method must be a str such as '/package.Service/Method', got {method!r}"
        )
    if not metadata:
        return
    if isinstance(metadata, str | bytes) or not isinstance(metadata, Sequence):
        raise TypeError(f"metadata must be pairs of str, got {type(metadata).__name__}")
    for pair in metadata:
        # The values may be secrets: not shown.
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(
                f"metadata must be pairs of str, got a {type(pair).__name__}"
            )
        key, value = pair
        if not is_metadata_key(key):
            raise ValueError(
                f"metadata keys must be of a-z, 0-9, '_', '-' and '.', got {key!r}"
            )
        if not isinstance(value, bytes if key.endswith("-bin") else str):
            raise TypeError(
                f"metadata {key!r} must be a str, and bytes only if its key ends with "
                f"-bin, got {type(value).__name__}"
            )
        if isinstance(value, str) and not (value.isascii() and value.isprintable()):
            raise ValueError(f"metadata {key!r} must be printable ASCII")


def _abandon(runtime: Runtime, lease: Lease, conn: object) -> None:
    """
    Have *lease* taken back soon, whose *conn* is being destroyed; from any thread.

    Garbage is collected at any moment: here, nothing of the pool may be changed.
    """
    if runtime.done.is_set() or runtime.home.is_forked():
        return  # nothing is left that could be given back
    runtime.home.call_soon(partial(_reclaim, runtime, lease))
    if lease.refused:
        return  # the caller got an error already
    warnings.warn(
        f"{runtime.label}: a lease of a connection to {runtime.target} was "
        "garbage-collected and not released; use `async with pool.acquire()`, or "
        "release() it",
        ResourceWarning,
        stacklevel=3,
        source=conn,
    )


def _reclaim(runtime: Runtime, lease: Lease) -> None:
    if runtime.done.is_set():
        return
    if lease.refused:
        runtime.release(lease)
        return
    before = runtime.state.in_use
    holder = None if runtime.leaks is None else runtime.leaks.holder(lease)
    runtime.counters.reclaimed += 1
    runtime.release(lease)
    runtime.log_limit.report(
        logging.WARNING,
        "lease garbage-collected",
        "%s: took back a lease that was garbage-collected after %.1f s and not "
        "released (streams in use: %d -> %d), held by %s",
        *(runtime.label, runtime.perf_counter() - lease.held_since),
        *(before, runtime.state.in_use),
        holder or "whom leak_threshold would tell",
    )
