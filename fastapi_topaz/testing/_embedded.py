"""An authorizer inside the test process: what a test does with it."""

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
    A real gRPC authorizer on 127.0.0.1 whose policies are written in Python.

    For tests and demos: it counts every socket and every call, and breaks in all
    the ways a server and a network can. Constructing it starts nothing. It is a
    context manager, also an asynchronous one (on asyncio and trio), and may be
    used from any thread. Policies and faults outlive `stop` and `start`.

    Args:
        policies: What is allowed: a mapping of policy paths to a bool, to a mapping
            of decisions to bools, or to a function of a
            [Check][fastapi_topaz.testing.Check] that returns either; or one such
            function for all paths. Functions may be async; they run in the
            server's thread. None means no policies: whatever is asked for is
            undefined, which Topaz answers with INVALID_ARGUMENT.
        tls: Serve TLS with a certificate for `localhost` and 127.0.0.1, signed by a
            CA made for the purpose. Needs the extra `testing`.
        api_key: If given, calls without it get UNAUTHENTICATED; `Info` never.
        tenant_id: If given, calls without it get PERMISSION_DENIED; `Info` never.
        identities: Who is in the directory: calls on behalf of a SUB or JWT that is
            not among these get NOT_FOUND. None means that everybody is.
        port: Where to listen; 0 chooses a free port at the first start.
        max_concurrent_streams: HTTP/2 streams a client may have open at once on
            one connection; None means no limit.

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
        # Only for its checks: the url is known after the start.
        AuthorizerOptions(api_key=api_key, tenant_id=tenant_id)
        # Empty ones would let in every client, which is not what they look like.
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
        Listen, on the same port as before if it was started before.

        Does nothing if it listens already.

        Raises:
            OSError: The port is taken.
            ImportError: TLS is wanted and trustme is not installed.
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

        Does nothing if it is stopped already.

        Args:
            grace: Seconds that running calls get to finish. With 0 sockets close
                at once, as if the process had been killed; with more, clients are
                told to go away first, as Topaz does when it is asked to end.

        Raises:
            RuntimeError: Called from a policy, which runs in that very thread.
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

    # -- where it is

    @property
    def port(self) -> int:
        """
        The port; it stays the same for the life of the object.

        Raises:
            RuntimeError: No port was given, and it was never started.
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
        """The PEM file of the CA to trust; None without TLS or before the start."""
        return None if self._certificates is None else self._certificates.ca_path

    @property
    def options(self) -> AuthorizerOptions:
        """What a client needs to be let in."""
        return AuthorizerOptions(
            url=self.url,
            tenant_id=self._tenant_id,
            api_key=self._api_key,
            cert_file_path=self.ca_cert_path,
            insecure=not self._tls,
        )

    # -- what it answers

    @property
    def policies(self) -> dict[str, Policy] | PolicyFunction:
        """
        The policies; assign to replace them all, or change the dict for one path.

        Raises:
            TypeError: Assigned something that is no policy.
        """
        return self._service.policies

    @policies.setter
    def policies(self, policies: Policies | None) -> None:
        self._service.policies = validated(policies)

    @property
    def delay(self) -> float:
        """Seconds that every call waits before its answer; 0 at first."""
        return self._service.delay

    @delay.setter
    def delay(self, delay: float) -> None:
        self._service.delay = check_seconds("delay", delay)

    # -- what it saw

    @property
    def connections_accepted(self) -> int:
        """TCP connections accepted since the first start, or the last reset."""
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
        """Calls given up before the answer: cancelled, timed out or disconnected."""
        return self._service.cancelled

    def reset_counters(self) -> None:
        """Count from 0 again; what is open or running now is not changed."""
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
        Answer with a status instead; replaces what an earlier `fail` asked for.

        Args:
            code: The status, or its name such as "UNAVAILABLE".
            details: The text that goes with it.
            times: How many calls fail; None means all until `heal`.
            methods: Short names such as "Is" of the methods that fail; None means
                all of them.

        Raises:
            ValueError: No such status or method, OK, or *times* less than 1.
        """
        if isinstance(code, str):
            try:
                code = grpc.StatusCode[code.upper()]
            except KeyError:
                raise ValueError(f"code must be a gRPC status, got {code!r}") from None
        if code is grpc.StatusCode.OK:
            raise ValueError("code must not be OK: that is no failure")
        if times is not None and times < 1:
            raise ValueError(f"times must be at least 1 or None, got {times!r}")
        names = METHODS if methods is None else frozenset(methods)
        if not names <= METHODS:
            raise ValueError(
                f"methods must be some of {sorted(METHODS)}, got {sorted(names)}"
            )
        self._service.failure = Failure(code, details, times, names)

    def heal(self) -> None:
        """End all faults: answer, at once, and let held bytes go on."""
        self._service.failure = None
        self._service.delay = 0.0
        self.thaw()

    def freeze(self) -> None:
        """
        Fall silent: sockets stay open, no byte passes in either direction.

        New connections are accepted and stay silent too.
        """
        self._in_loop(lambda: self._relay.set_frozen(True))

    def thaw(self) -> None:
        """Let the bytes that `freeze` held go on, and all that follow."""
        self._in_loop(lambda: self._relay.set_frozen(False))

    def drop_connections(self, count: int | None = None) -> int:
        """
        Reset connections (TCP RST), the oldest first.

        Args:
            count: How many at most; None means all.

        Returns:
            How many there were to reset.

        Raises:
            ValueError: *count* is negative.
        """
        if count is not None and count < 0:
            raise ValueError(f"count must be at least 0 or None, got {count}")
        dropped = self._in_loop(lambda: self._relay.drop(count))
        # Sockets close in the turn of the loop after the one that aborts them.
        self._in_loop(lambda: None)
        return dropped

    def _in_loop(self, action: Callable[[], _T]) -> _T:
        """Do *action* where the relay lives, and wait for it."""
        if self._inside:
            return action()
        with self._lock:
            return action() if self._server is None else self._server.call(action)

    @property
    def _inside(self) -> bool:
        """Whether a policy asks: it must not wait for the thread it runs in."""
        server = self._server
        return server is not None and server.is_current
