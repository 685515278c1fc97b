"""A connector that plays a script: pools without a network."""

from __future__ import annotations

import inspect
from collections import deque
from typing import TYPE_CHECKING, Any

import anyio
import attrs

from fastapi_topaz._checks import check_seconds
from fastapi_topaz._pool.connector import Verdict
from fastapi_topaz.exceptions import ConnectFailed, ConnectionLost


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


__all__ = ["FakeConnection", "FakeConnector", "Step", "fail", "hang", "ok", "slow"]


@attrs.frozen
class Step:
    """
    How one attempt to connect goes; made by `ok`, `slow`, `fail` and `hang`.

    Attributes:
        delay: Seconds before the outcome.
        error: What the attempt raises; None if it succeeds.
    """

    delay: float = 0.0
    error: Exception | None = None


def ok() -> Step:
    """Return a step that connects at once."""
    return Step()


def slow(delay: float) -> Step:
    """Return a step that connects after *delay* seconds."""
    return Step(delay=check_seconds("delay", delay))


def fail(error: Exception | str = "refused by the script") -> Step:
    """Return a step that raises *error*; a text makes it a `ConnectFailed`."""
    if isinstance(error, str):
        error = ConnectFailed(error, reason="refused")
    return Step(error=error)


def hang() -> Step:
    """Return a step that never ends."""
    return Step(delay=float("inf"))


@attrs.define(eq=False, slots=False)
class FakeConnection:
    """
    What a `FakeConnector` makes.

    Attributes:
        number: Counted from 1, in the order they were made.
        alive: Whether probes succeed; set it to False to play dead.
        frozen: Whether probes and calls never end.
        hung_up: Whether the other side has gone away, which the pool notices; probes
            and calls fail.
        refuses: If not empty, probes and calls are answered with this text, as a proxy
            does whose server is down: they raise `ConnectionRefusedError`.
        probes: Probes so far.
        calls: Calls so far.
        closed: Times it was closed, which should end at one.
    """

    connector: FakeConnector = attrs.field(repr=False)
    number: int
    alive: bool = True
    frozen: bool = False
    hung_up: bool = False
    refuses: str = ""
    probes: int = 0
    calls: int = 0
    closed: int = 0

    async def probe(self, timeout: float, /) -> None:  # noqa: ARG002
        """Raise `ConnectionLost` unless `alive`; see `refuses` for another error."""
        self.probes += 1
        await self._answer()

    async def call(
        self,
        method: str,
        request: bytes,
        *,
        timeout: float | None = None,
        **_options: Any,
    ) -> bytes:
        """
        Return what the connector's `answer` makes of the request.

        Raises:
            TimeoutError: It took more than *timeout* seconds.
            ConnectionLost: It is not `alive`, or it is closed.
            ConnectionRefusedError: It `refuses`.
        """
        self.calls += 1
        with anyio.fail_after(timeout):
            await self._answer()
            answer = self.connector.answer(method, request)
            response: bytes = await answer if inspect.isawaitable(answer) else answer
        return response

    def judge(self, error: BaseException, /) -> Verdict | None:
        """Say that the connection broke if *error* is `ConnectionLost`."""
        if isinstance(error, ConnectionLost):
            return Verdict.BROKEN
        if isinstance(error, ConnectionRefusedError):
            return Verdict.REFUSED
        return Verdict.SILENT if isinstance(error, TimeoutError) else None

    def is_lost(self) -> bool:
        """Say whether the server hung up."""
        return self.hung_up

    @property
    def peer(self) -> str:
        """The address: `fake:` and the number."""
        return f"fake:{self.number}"

    async def close(self, grace: float, /) -> None:  # noqa: ARG002
        """Count the closing."""
        self.closed += 1
        await anyio.lowlevel.checkpoint()

    async def _answer(self) -> None:
        if self.frozen:
            await anyio.sleep_forever()
        await anyio.lowlevel.checkpoint()
        if self.closed or self.hung_up or not self.alive:
            raise ConnectionLost(f"fake connection {self.number} is dead")
        if self.refuses:
            raise ConnectionRefusedError(self.refuses)


class FakeConnector:
    """
    Makes connections in memory, each attempt as the next step of the script says.

    Args:
        script: Steps made by `ok`, `slow`, `fail` and `hang`. After the last one
            every attempt goes as *default* says.
        default: What happens after the script, default `ok()`.
        answer: Called with the method and the bytes of the request for each call,
            returns the bytes of the response; may be async. Default: the request.

    Attributes:
        attempts: Attempts so far.
        connections: All connections ever made.
        peak: The most that were open and being established at once.
    """

    target = "fake"

    def __init__(
        self,
        script: Iterable[Step] = (),
        *,
        default: Step | None = None,
        answer: Callable[[str, bytes], Any] | None = None,
    ) -> None:
        self._script = deque(script)
        self.default: Step = default or ok()
        self.answer: Callable[[str, bytes], Any] = answer or (
            lambda _method, request: request
        )
        self.attempts: int = 0
        self.connections: list[FakeConnection] = []
        self.peak: int = 0
        self._connecting = 0

    def __repr__(self) -> str:
        return (
            f"<FakeConnector attempts={self.attempts} made={len(self.connections)} "
            f"open={len(self.open)}>"
        )

    @property
    def open(self) -> list[FakeConnection]:
        """The connections that are not closed."""
        return [conn for conn in self.connections if not conn.closed]

    async def connect(self, timeout: float, /) -> FakeConnection:  # noqa: ARG002
        """Play the next step."""
        self.attempts += 1
        step = self._script.popleft() if self._script else self.default
        self._connecting += 1
        self.peak = max(self.peak, self._connecting + len(self.open))
        try:
            if step.delay == float("inf"):
                await anyio.sleep_forever()
            await anyio.sleep(step.delay)
            if step.error is not None:
                # One error is raised many times, and would collect all their frames.
                raise step.error.with_traceback(None)
        finally:
            self._connecting -= 1
        conn = FakeConnection(self, len(self.connections) + 1)
        self.connections.append(conn)
        return conn
