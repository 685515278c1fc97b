"""
Server-sent events for the status page: a new snapshot every second.

Each event is also the heartbeat. If none comes, the page knows that the connection is
dead, and the server notices the end of its client.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import anyio

from fastapi_topaz._app.listeners import Listeners


if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Message, Receive, Send


__all__ = ["Streams"]


EVERY = 1.0
"""Seconds between two events."""

LOOK = 0.1
"""Seconds between two looks whether the server shuts down."""

LONGEST = 15.0
"""
Seconds until a stream ends and the browser asks for a new one.

So the guard decides again, and a right that was taken away does not last. It is also
the longest delay of a shutdown that `Listeners` does not notice.
"""

SLOWEST = 5.0
"""Seconds in which a client must read an event. Otherwise its stream ends."""

MOST_STREAMS = 16
"""The streams of one page in one process. Each one is a connection and a task."""

RETRY = b"retry: 500\n\n"
"""Tells the browser how many milliseconds after its end to ask for a new stream."""


class Streams:
    """
    The streams of one status page.

    Args:
        text: Returns the snapshot as JSON, in one line.
    """

    def __init__(self, text: Callable[[], str]) -> None:
        self._text = text
        self._running = 0
        self._made_at = float("-inf")
        self._event = b""

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another stream."""
        return self._running >= MOST_STREAMS

    async def run(self, receive: Receive, send: Send, start: Message) -> None:
        """Send *start* and then events, until the stream ends."""
        self._running += 1
        try:
            with anyio.fail_after(SLOWEST):
                await send(start)
            # An OSError is what some servers raise if the client is gone.
            await self._run(receive, send)
        except* OSError:
            pass
        finally:
            self._running -= 1

    async def _run(self, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as tasks:

            async def until_gone() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                tasks.cancel_scope.cancel()

            tasks.start_soon(until_gone)
            await self._send_events(send)
            tasks.cancel_scope.cancel()

    async def _send_events(self, send: Send) -> None:
        # Half a pause earlier, because pauses are not exact.
        ends_at = anyio.current_time() + LONGEST - EVERY / 2
        listeners = Listeners()
        await _send(send, RETRY)
        over = False
        while not over:
            await _send(send, self._next())
            over = await _pause(listeners) or anyio.current_time() >= ends_at
        await _send(send, b"", more=False)

    def _next(self) -> bytes:
        """Return the event of now, which all streams share."""
        now = time.monotonic()
        if not 0 <= now - self._made_at < EVERY / 2:
            self._event = b"data: " + self._text().encode() + b"\n\n"
            self._made_at = now
        return self._event


async def _pause(listeners: Listeners) -> bool:
    """Sleep until the next event is due; return True if the server shuts down."""
    for _ in range(round(EVERY / LOOK)):
        await anyio.sleep(LOOK)
        if listeners.is_one_closed():
            return True
    return False


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    with anyio.fail_after(SLOWEST):
        await send({"type": "http.response.body", "body": body, "more_body": more})
