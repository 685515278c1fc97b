"""
Generated stubs on a connection of a pool.

The gRPC plugin of protoc generates a class for each service. Its constructor asks a
channel for one callable per method, and keeps them as attributes. `StubChannel` is such
a channel. Its callables make their calls through a lease.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import grpc
import grpc.aio

from fastapi_topaz._error_text import safe_text
from fastapi_topaz._redaction import boundary


if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from fastapi_topaz._rpc.metadata import Metadata


__all__ = ["make_stub"]


T = TypeVar("T")


def make_stub(cls: Callable[[Any], T], call: Callable[..., Any]) -> T:
    """
    Return an object of the generated class *cls* whose methods use *call*.

    Args:
        cls: The class of a stub. Its only argument is a channel.
        call: Makes one unary-unary call. See `PooledConnection.call`.

    Raises:
        TypeError: *cls* is not a class, or it cannot be made from a channel alone.
    """
    if not isinstance(cls, type):
        # Only the type is shown: the object may be a request that holds an identity.
        raise TypeError(
            "stub() needs the class of a generated stub, as in "
            f"`conn.stub(GreeterStub)`, got a {type(cls).__name__}"
        )
    try:
        made: T = cls(StubChannel(call))
    except Exception as error:
        raise TypeError(
            f"stub() cannot make {cls.__qualname__} from a channel alone. It needs a "
            "class that protoc's gRPC plugin generates, such as GreeterStub. "
            f"{cls.__qualname__}(channel) raised {type(error).__name__}: "
            f"{safe_text(error)}"
        ) from error
    return made


class StubChannel:
    """
    The methods of a `grpc.aio.Channel` that generated stubs use.

    Strictly private.
    """

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def unary_unary(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes] | None = None,
        response_deserializer: Callable[[bytes], Any] | None = None,
        _registered_method: bool | None = False,
    ) -> UnaryUnary:
        """Return the callable of a method with one request and one response."""
        read = response_deserializer and partial(_read, method, response_deserializer)
        return UnaryUnary(self._call, method, request_serializer, read)

    def unary_stream(self, method: str, *_args: object, **_more: object) -> Streaming:
        """Return the callable of a method that streams its responses."""
        return Streaming(method, "responses")

    def stream_unary(self, method: str, *_args: object, **_more: object) -> Streaming:
        """Return the callable of a method that streams its requests."""
        return Streaming(method, "requests")

    def stream_stream(self, method: str, *_args: object, **_more: object) -> Streaming:
        """Return the callable of a method that streams requests and responses."""
        return Streaming(method, "requests and responses")

    def __getattr__(self, name: str) -> NoReturn:
        # The stubs of grpclib and betterproto use their channel only when called.
        raise AttributeError(
            f"the channel of stub() has no {name!r}: stub() needs a class that "
            "protoc's gRPC plugin generates (grpcio-tools), for grpc or grpc.aio"
        )


_UNSUPPORTED = {
    "credentials": "pass metadata= to the call, or Target(credentials=...) to its pool",
    "wait_for_ready": "a lease has a connection; acquire(timeout=...) waits for one",
    "compression": "requests are not compressed",
}
"""The arguments of a grpc.aio call that must be None, and what to do instead."""


class UnaryUnary:
    """
    One method of a stub, with one request and one response.

    Strictly private.
    """

    __slots__ = ("_call", "_method", "_read", "_serialize")

    def __init__(
        self,
        call: Callable[..., Any],
        method: str,
        serialize: Callable[[Any], bytes] | None,
        read: Callable[[bytes], Any] | None,
    ) -> None:
        self._call = call
        self._method = method
        self._serialize = serialize
        self._read = read

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._method}>"

    # Not a coroutine function. So the call has one coroutine and not two, and a wrong
    # argument is an error even if the result is not awaited.
    @boundary
    def __call__(
        self,
        request: Any,
        *,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        credentials: None = None,
        wait_for_ready: None = None,
        compression: None = None,
    ) -> Coroutine[Any, Any, Any]:
        """
        Make the call. The result must be awaited, and returns the response.

        Args:
            request: The message to send.
            timeout: Seconds until the call fails with DEADLINE_EXCEEDED. None, the
                default, means no limit.
            metadata: Pairs of key and value, or a `grpc.aio.Metadata`. None, the
                default, means none.
            credentials: Must be None.
            wait_for_ready: Must be None.
            compression: Must be None.

        Raises:
            ValueError: An argument that must be None is given.
            Exception: When awaited, the errors of `PooledConnection.call`. Also
                `grpc.aio.AioRpcError` with INTERNAL if the response cannot be read.
        """
        if not (credentials is wait_for_ready is compression is None):
            raise self._unsupported((credentials, wait_for_ready, compression))
        if metadata is None:
            metadata = ()
        elif isinstance(metadata, grpc.aio.Metadata):  # it is not a Sequence
            metadata = tuple(metadata)
        made: Coroutine[Any, Any, Any] = self._call(
            self._method,
            request,
            request_serializer=self._serialize,
            response_deserializer=self._read,
            timeout=timeout,
            metadata=metadata,
        )
        return made

    def _unsupported(self, given: tuple[object, ...]) -> ValueError:
        named = zip(_UNSUPPORTED.items(), given, strict=True)
        (name, remedy), value = next(each for each in named if each[1] is not None)
        return ValueError(
            f"{name} must be None in a call of {self._method} on a pooled connection, "
            f"got a {type(value).__name__}: {remedy}"
        )


class Streaming:
    """
    One method of a stub that streams, which is not supported yet.

    The other methods of its service work, so it raises an error only if it is called.

    Strictly private.
    """

    __slots__ = ("_method", "_what")

    def __init__(self, method: str, what: str) -> None:
        self._method = method
        self._what = what

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._method}>"

    def __call__(self, *_args: object, **_more: object) -> NoReturn:
        """
        Raise an error.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            f"{self._method} streams its {self._what}. A pooled connection makes only "
            "calls with one request and one response. Use a grpc.aio channel for it"
        )


def _read(method: str, deserialize: Callable[[bytes], Any], response: bytes) -> Any:
    """
    Return *response* as a message.

    Raises:
        grpc.aio.AioRpcError: It cannot be parsed. The status is INTERNAL, as with a
            synchronous channel of gRPC. grpc.aio hides the error and returns None.
    """
    try:
        return deserialize(response)
    except Exception as error:
        raise grpc.aio.AioRpcError(
            grpc.StatusCode.INTERNAL,
            grpc.aio.Metadata(),
            grpc.aio.Metadata(),
            f"the response of {method} cannot be read",
        ) from error
