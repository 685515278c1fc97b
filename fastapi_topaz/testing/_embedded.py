"""The embedded authorizer: a real gRPC authorizer inside the test process."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Self, TypeVar

import grpc

from fastapi_topaz._authorizer.options import AuthorizerOptions
from fastapi_topaz._checks import check_seconds, check_text
from fastapi_topaz._redaction import boundary

from ._certs import Certificates
from ._policies import Policies, Policy, PolicyFunction, validated
from ._relay import Relay
from ._server import ServerThread
from ._service import METHODS, AuthorizerService, Failure


if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable


__all__ = ["EmbeddedAuthorizer"]


_T = TypeVar("_T")


class EmbeddedAuthorizer:
    """
    A real gRPC authorizer on 127.0.0.1 with policies written in Python.

    It is for tests and demos. It counts every socket and every call, and can simulate
    faults of a server and of a network. The constructor starts nothing. The object is
    a context manager for `with` and for `async with` (on asyncio and trio). Any thread
    may use it. Policies and faults stay the same after `stop` and `start`.

    Args:
        policies: The policies: a mapping of paths to policies, or one function for
            all paths. A policy is a bool, a mapping of decisions to bools, or a
            function. A function takes a [Check][fastapi_topaz.testing.Check] and
            returns a bool or such a mapping. It may be async, and runs in the
            server's thread. None, the default, means no policies: every decision is
            undefined, which Topaz answers with INVALID_ARGUMENT.
        tls: Whether to serve TLS, default False. The certificate is for `localhost`
            and 127.0.0.1, signed by a new CA. Needs the extra `testing`.
        api_key: If given, calls without this key get UNAUTHENTICATED, except `Info`.
        tenant_id: If given, calls without this tenant get PERMISSION_DENIED, except
            `Info`.
        identities: The identities in the directory. Calls for another SUB or JWT get
            NOT_FOUND. None, the default, means that every identity exists.
        port: The port to listen on. With 0, the default, the first start chooses a
            free port.
        max_concurrent_streams: Maximum number of open HTTP/2 streams on one
            connection. None, the default, means no limit.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    @boundary
    def __init__(
        self,
        policies: Policies | None = None,
        *,
        tls: bool = False,
        api_key: str | None = None,
        tenant_id: str | None = None,
        identities: Collection[str] | None = None,
        port: int = 0,
        max_concurrent_streams: int | None = None,
    ) -> None:
        # Created only to check the arguments. The url is not known before the start.
        AuthorizerOptions(api_key=api_key, tenant_id=tenant_id)
        # Empty values are refused, because they would silently accept every client.
        check_text("api_key", api_key)
        check_text("tenant_id", tenant_id)
        if not 0 <= port <= 65535:
            raise ValueError(f"port must be from 0 to 65535, got {port!r}")
        if max_concurrent_streams is not None and max_concurrent_streams < 1:
            raise ValueError(
                "max_concurrent_streams must be at least 1 or None, got "
                f"{max_concurrent_streams!r}"
            )
        if isinstance(identities, str):
            raise TypeError("identities must be a collection of str, got a str")
        self._tls = tls
        self._api_key = api_key
        self._tenant_id = tenant_id
        self._port = port
        self._max_concurrent_streams = max_concurrent_streams
        self._service = AuthorizerService(
            api_key=api_key,
            tenant_id=tenant_id,
            identities=None if identities is None else frozenset(identities),
        )
        self._relay = Relay()
        self._certificates: Certificates | None = None
        self._server: ServerThread | None = None
        self._lock = threading.Lock()
        self.policies = policies

    def __repr__(self) -> str:
        state = "running" if self._server is not None else "stopped"
        return f"<EmbeddedAuthorizer port={self._port} {state}>"

    # -- lifecycle

    def start(self) -> Self:
        """
        Start to listen. After a restart, the port is the same as before.

        If the authorizer is already running, this does nothing.

        Raises:
            OSError: The port is in use.
            ImportError: *tls* is True, but trustme is not installed.
        """
        if self._inside:
            return self
        with self._lock:
            if self._server is None:
                if self._tls and self._certificates is None:
                    self._certificates = Certificates.issue()
                server = ServerThread(
                    self._relay,
                    self._service,
                    self._certificates,
                    self._max_concurrent_streams,
                )
                self._port = server.start(self._port)
                self._server = server
        return self

    def stop(self, grace: float = 0.0) -> None:
        """
        Refuse connections, close all sockets and end the thread.

        If the authorizer is already stopped, this does nothing.

        Args:
            grace: Time limit in seconds for running calls to finish. With 0, the
                default, sockets close at once, as if the process was killed. With
                more, clients first get GOAWAY, as from a Topaz that shuts down.

        Raises:
            RuntimeError: Called from a policy, which runs in the thread to end.
        """
        grace = check_seconds("grace", grace, infinite=False)
        if self._inside:
            raise RuntimeError("a policy cannot stop the authorizer it runs in")
        with self._lock:
            if self._server is not None:
                self._server.stop(grace)
                self._server = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        return self.start()

    async def __aexit__(self, *_: object) -> None:
        self.stop()

    # -- address and credentials

    @property
    def port(self) -> int:
        """
        The port, which stays the same for the life of the object.

        Raises:
            RuntimeError: No port was given, and the authorizer was never started.
        """
        if self._port == 0:
            raise RuntimeError("the port is chosen by start(), which was not called")
        return self._port

    @property
    def url(self) -> str:
        """The address, as `127.0.0.1:PORT`."""
        return f"127.0.0.1:{self.port}"

    @property
    def ca_cert_path(self) -> str | None:
        """The PEM file of the CA. None without TLS or before the first start."""
        return None if self._certificates is None else self._certificates.ca_path

    @property
    def options(self) -> AuthorizerOptions:
        """The options with which a client can connect."""
        return AuthorizerOptions(
            url=self.url,
            tenant_id=self._tenant_id,
            api_key=self._api_key,
            cert_file_path=self.ca_cert_path,
            insecure=not self._tls,
        )

    # -- policies and delay

    @property
    def policies(self) -> dict[str, Policy] | PolicyFunction:
        """
        The policies. Assign to replace them all, or change the dict for one path.

        Raises:
            TypeError: The assigned value has the wrong type.
            ValueError: A path is empty.
        """
        return self._service.policies

    @policies.setter
    def policies(self, policies: Policies | None) -> None:
        self._service.policies = validated(policies)

    @property
    def delay(self) -> float:
        """Time in seconds that every call waits before its answer. Initially 0."""
        return self._service.delay

    @delay.setter
    def delay(self, delay: float) -> None:
        self._service.delay = check_seconds("delay", delay)

    # -- counters

    @property
    def connections_accepted(self) -> int:
        """TCP connections accepted since the first start or `reset_counters`."""
        return self._relay.accepted

    @property
    def connections_open(self) -> int:
        """TCP connections open now."""
        return len(self._relay.pairs)

    @property
    def streams(self) -> int:
        """Calls being handled now."""
        return self._service.streams

    @property
    def calls(self) -> Counter[str]:
        """How often each method was called, by its short name such as `Is`."""
        return Counter(self._service.calls)

    @property
    def cancelled(self) -> int:
        """Calls that ended before the answer: cancelled, timed out or disconnected."""
        return self._service.cancelled

    def reset_counters(self) -> None:
        """Set the counters to 0. Counts of open connections and running calls stay."""
        self._in_loop(self._reset_counters)

    def _reset_counters(self) -> None:
        self._relay.accepted = 0
        self._service.calls = {}
        self._service.cancelled = 0

    # -- faults

    def fail(
        self,
        code: grpc.StatusCode | str,
        details: str = "",
        *,
        times: int | None = None,
        methods: Iterable[str] | None = None,
    ) -> None:
        """
        Answer calls with an error status. Replaces an earlier `fail`.

        Args:
            code: The status, or its name such as "UNAVAILABLE".
            details: The text sent with the status, default empty.
            times: The number of calls that fail. None, the default, means all calls
                until `heal`.
            methods: Short names of the methods that fail, such as "Is". None, the
                default, means all methods.

        Raises:
            ValueError: The status or a method does not exist, the status is OK, or
                *times* is less than 1.
        """
        if isinstance(code, str):
            try:
                code = grpc.StatusCode[code.upper()]
            except KeyError:
                raise ValueError(f"code must be a gRPC status, got {code!r}") from None
        if code is grpc.StatusCode.OK:
            raise ValueError("code must not be OK: that is not a failure")
        if times is not None and times < 1:
            raise ValueError(f"times must be at least 1 or None, got {times!r}")
        names = METHODS if methods is None else frozenset(methods)
        if not names <= METHODS:
            raise ValueError(
                f"methods must be some of {sorted(METHODS)}, got {sorted(names)}"
            )
        self._service.failure = Failure(code, details, times, names)

    def heal(self) -> None:
        """End all faults: `fail`, `delay` and `freeze`."""
        self._service.failure = None
        self._service.delay = 0.0
        self.thaw()

    def freeze(self) -> None:
        """
        Stop all traffic. Sockets stay open, but no byte passes in either direction.

        New connections are accepted, but no byte passes there either.
        """
        self._in_loop(lambda: self._relay.set_frozen(True))

    def thaw(self) -> None:
        """End `freeze`: forward the held bytes and all further bytes."""
        self._in_loop(lambda: self._relay.set_frozen(False))

    def drop_connections(self, count: int | None = None) -> int:
        """
        Reset connections (TCP RST), the oldest first.

        Args:
            count: Maximum number to reset. None, the default, means all.

        Returns:
            The number of connections that were reset.

        Raises:
            ValueError: *count* is negative.
        """
        if count is not None and count < 0:
            raise ValueError(f"count must be at least 0 or None, got {count}")
        dropped = self._in_loop(lambda: self._relay.drop(count))
        # Sockets close one iteration of the loop after abort(), so wait for one more.
        self._in_loop(lambda: None)
        return dropped

    def _in_loop(self, action: Callable[[], _T]) -> _T:
        """Run *action* in the relay's thread and return its result."""
        if self._inside:
            return action()
        with self._lock:
            return action() if self._server is None else self._server.call(action)

    @property
    def _inside(self) -> bool:
        """Whether a policy calls. It must not wait for the thread in which it runs."""
        server = self._server
        return server is not None and server.is_current
