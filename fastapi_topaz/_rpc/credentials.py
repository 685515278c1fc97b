"""Metadata that the application computes for each call, such as a key that rotates."""

from __future__ import annotations

import asyncio
import inspect
import traceback
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

from fastapi_topaz._pool.clock import time_limit
from fastapi_topaz._rpc.clock import left, monotonic
from fastapi_topaz._rpc.metadata import Credentials, Metadata, frozen_metadata
from fastapi_topaz._rpc.statuses import Ending, LateCredentials
from fastapi_topaz.exceptions import ConnectFailed, CredentialsFailed


if TYPE_CHECKING:
    from fastapi_topaz._pool.connector import Verdict
    from fastapi_topaz._rpc.target import Target


__all__ = ["CallCredentials", "Computed", "CredentialedConnection"]


_SHARE: Final = 0.95
"""The part of a probe's timeout after which the error names the cause, in time."""


class Computed(tuple[tuple[str, str | bytes], ...]):
    """Metadata of one call that include those of `credentials` already."""

    __slots__ = ()


class CredentialedConnection:
    """
    A connection that asks the `credentials` of its target for each call and probe.

    Strictly private. The callable runs in the task of the caller.

    Args:
        connection: The connection that makes the calls, of any transport.
        target: Its target, with `credentials`.
    """

    def __init__(self, connection: Any, target: Target) -> None:
        self._connection = connection
        self._url = target.url
        self._ask = CallCredentials(target).ask
        # The pool calls it before each lease.
        self.is_lost = connection.is_lost

    def __getattr__(self, name: str) -> Any:
        # For what only some connections have, such as `run`.
        return getattr(self._connection, name)

    def __repr__(self) -> str:
        return repr(self._connection)

    async def call(
        self,
        method: str,
        request: bytes,
        *,
        timeout: float | None,
        metadata: Metadata,
    ) -> bytes:
        """
        Make one call with the credentials; *timeout* covers both.

        Raises:
            CredentialsFailed: The callable failed. The call was not sent.
            grpc.aio.AioRpcError: See `RpcConnection.call`. Also DEADLINE_EXCEEDED if
                the callable did not return in time.
        """
        if not isinstance(metadata, Computed):
            pairs, timeout = await self._ask(f"the call {method}", timeout)
            metadata = (*pairs, *metadata)
        response: bytes = await self._connection.call(
            method, request, timeout=timeout, metadata=metadata
        )
        return response

    async def probe(self, timeout: float, /) -> None:
        """Probe the server with the credentials; *timeout* covers both."""
        pairs, rest = await self._ask("the probe", timeout * _SHARE)
        await self._connection.probe(rest, pairs)

    async def greet(self, timeout: float, /) -> None:
        """
        Probe the server for the first time.

        Raises:
            ConnectFailed: The credentials failed, or see `RpcConnection`.
        """
        try:
            pairs, rest = await self._ask("the first probe", timeout * _SHARE)
        except (CredentialsFailed, LateCredentials) as error:
            late = isinstance(error, LateCredentials)
            raise ConnectFailed(
                f"cannot connect to {self._url}: "
                f"{error.details() if isinstance(error, LateCredentials) else error}",
                reason="timeout" if late else "other",
            ) from None
        await self._connection.greet(rest, pairs)

    def judge(self, error: BaseException, /) -> Verdict | None:
        """Return what *error* means for the connection: nothing if it was not used."""
        if isinstance(error, CredentialsFailed | LateCredentials):
            return None
        verdict: Verdict | None = self._connection.judge(error)
        return verdict

    @property
    def peer(self) -> str | None:
        """The address of the server, or None if it is unknown."""
        address: str | None = self._connection.peer
        return address

    async def close(self, grace: float, /) -> None:
        """Close the connection; see `Connection.close`."""
        await self._connection.close(grace)


class CallCredentials:
    """
    Computes the metadata of calls to one target, with its `credentials`.

    Args:
        target: The target, with `credentials`.
    """

    def __init__(self, target: Target) -> None:
        assert target.credentials is not None  # noqa: S101
        self._url = target.url
        self._credentials: Credentials = target.credentials
        self._taken = frozenset(key for key, _ in target.metadata)

    async def ask(
        self, what: str, timeout: float | None
    ) -> tuple[Metadata, float | None]:
        """
        Return the metadata for *what*, and the rest of *timeout*.

        Raises:
            CredentialsFailed: The callable raised an error, or returned metadata that
                cannot be sent.
            grpc.aio.AioRpcError: DEADLINE_EXCEEDED: it did not return in time.
        """
        deadline = None if timeout is None else monotonic() + timeout
        found: Any = None
        fault = ""
        is_late = False
        pairs: Metadata = ()
        try:
            found = self._credentials()
            if inspect.isawaitable(found):
                with time_limit(left(deadline)) as scope:
                    found = await found
                is_late = scope.cancelled_caught
            if not is_late:
                pairs = self._checked(found)
        except Exception as error:  # noqa: BLE001  (code of the application)
            fault = _fault(error)
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            # It awaited a task or future of asyncio that was cancelled.
            fault = "raised CancelledError, although the call was not cancelled"
        finally:
            # It is secret, and error trackers show the variables of frames.
            del found
        # Not in the handler: the text of the error may hold a secret, so the error must
        # not be the context of this one.
        if fault:
            raise CredentialsFailed(
                f"{what} to {self._url} was not sent: credentials {fault}"
            )
        rest = left(deadline)
        if is_late or rest == 0:
            raise LateCredentials(
                Ending.STATUS,
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"{what} to {self._url} was not sent: credentials took longer than its "
                f"timeout allows ({timeout:g} s)",
            )
        return pairs, rest

    def _checked(self, found: object) -> Metadata:
        """
        Return *found* as metadata.

        Raises:
            _WrongValue: It cannot be sent.
        """
        if not found and not isinstance(found, tuple | list | grpc.aio.Metadata):
            raise _WrongValue(
                f"returned a {type(found).__name__}; return () for no metadata"
            )
        try:
            pairs = frozen_metadata(found)
        except (TypeError, ValueError) as error:
            raise _WrongValue(f"returned a wrong value: {error}") from None
        for key, _ in pairs:
            if key in self._taken:
                raise _WrongValue(
                    f"returned {key!r}, which the metadata of the target (api_key, "
                    "tenant_id, extra_metadata) have too; remove it from one of them"
                )
        return pairs


class _WrongValue(Exception):  # noqa: N818  (never leaves this module)
    """What the callable returned cannot be sent."""


def _is_cancelled() -> bool:
    """Return whether this task of asyncio is cancelled; False on trio."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # on trio, where this is not the class of cancellations
        return False
    return task is None or task.cancelling() > 0


def _fault(error: Exception) -> str:
    """Return what is wrong with the callable, without the text of its own error."""
    if isinstance(error, _WrongValue):
        return str(error)
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return (
        f"raised {type(error).__name__} ({frame.f_code.co_filename}:{line}); its text "
        "is not shown, because it may hold a secret"
    )
