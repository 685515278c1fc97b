"""A fake connector that follows a script, to test pools without a network."""

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
    The outcome of one attempt to connect. Made by `ok`, `slow`, `fail` and `hang`.

    Attributes:
        delay: Seconds before the outcome, default 0.
        error: The error that the attempt raises. None, the default, means success.
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
    """Return a step that raises *error*. A str becomes a `ConnectFailed`."""
    if isinstance(error, str):
        error = ConnectFailed(error, reason="refused")
    return Step(error=error)


def hang() -> Step:
    """Return a step that never ends."""
    return Step(delay=float("inf"))


@attrs.define(eq=False, slots=False)
class FakeConnection:
    """
    A fake connection in memory, made by a `FakeConnector`.

    Attributes:
        number: The number of the connection, from 1, in the order of connecting.
        alive: If False, probes and calls fail. Default True.
        frozen: If True, probes and calls never end. Default False.
        hung_up: If True, the server has gone away: probes and calls fail, and the
            pool notices it. Default False.
        refuses: If not empty, probes and calls raise `ConnectionRefusedError` with
            this text. This simulates a proxy whose server is down. Default empty.
        probes: The number of probes so far.
        calls: The number of calls so far.
        closed: How many times it was closed. At the end of a test it should be 1.
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
        """
        Return if the connection is alive.

        Raises:
            ConnectionLost: It is not `alive`, it is `hung_up` or it is closed.
            ConnectionRefusedError: `refuses` is not empty.
        """
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
        Return the response that the connector's `answer` gives for the request.

        Raises:
            TimeoutError: The call took more than *timeout* seconds.
            ConnectionLost: It is not `alive`, it is `hung_up` or it is closed.
            ConnectionRefusedError: `refuses` is not empty.
        """
        self.calls += 1
        with anyio.fail_after(timeout):
            await self._answer()
            answer = self.connector.answer(method, request)
            response: bytes = await answer if inspect.isawaitable(answer) else answer
        return response

    def judge(self, error: BaseException, /) -> Verdict | None:
        """
        Return the verdict for *error*.

        `ConnectionLost` is BROKEN, `ConnectionRefusedError` is REFUSED, `TimeoutError`
        is SILENT, and any other error is None.
        """
        if isinstance(error, ConnectionLost):
            return Verdict.BROKEN
        if isinstance(error, ConnectionRefusedError):
            return Verdict.REFUSED
        return Verdict.SILENT if isinstance(error, TimeoutError) else None

    def is_lost(self) -> bool:
        """Return whether the server has gone away (`hung_up`)."""
        return self.hung_up

    @property
    def peer(self) -> str:
        """The address: `fake:` and the `number`."""
        return f"fake:{self.number}"

    async def close(self, grace: float, /) -> None:  # noqa: ARG002
        """Count the call in `closed`."""
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
    A connector that makes fake connections in memory. It follows a script.

    Args:
        script: One step for each attempt to connect, made by `ok`, `slow`, `fail` and
            `hang`. Default empty.
        default: The step for each attempt after the end of the script, default
            `ok()`.
        answer: A function that answers calls. It gets the method and the bytes of the
            request, and returns the bytes of the response. It may be async. By
            default, the response is the request.

    Attributes:
        attempts: The number of attempts so far.
        connections: All connections made so far.
        peak: The highest number of connections that were open or connecting at once.
    """

    target = "fake"
    """The address in logs and errors."""

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
        """Follow the next step of the script."""
        self.attempts += 1
        step = self._script.popleft() if self._script else self.default
        self._connecting += 1
        self.peak = max(self.peak, self._connecting + len(self.open))
        try:
            if step.delay == float("inf"):
                await anyio.sleep_forever()
            await anyio.sleep(step.delay)
            if step.error is not None:
                # The same error may be raised many times. Without this, its traceback
                # would keep the frames of all of them.
                raise step.error.with_traceback(None)
        finally:
            self._connecting -= 1
        conn = FakeConnection(self, len(self.connections) + 1)
        self.connections.append(conn)
        return conn
