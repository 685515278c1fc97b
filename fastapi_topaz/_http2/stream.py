"""The stream of one call, from the request to the outcome."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastapi_topaz._http2.responses import Response


if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["Stream"]


class Stream:
    """
    A stream of HTTP/2 that carries a unary call (RFC 9113, section 5).

    Its id is 0 until it is opened: a call may wait for the stream limit of the peer, or
    for the socket. When it has an outcome, the connection has removed it.

    Args:
        block: The header block of the request.
        header_list_size: The size of its header list.
        message: The message of the request.
        deadline: When the call ends at the latest, by the clock of the I/O layer. None
            means no limit.
        wake: Called once, when `outcome` is set. It must not call the connection.
    """

    __slots__ = (
        "block",
        "deadline",
        "header_list_size",
        "id",
        "message",
        "outcome",
        "padding",
        "response",
        "send_window",
        "unsent",
        "wake",
    )

    def __init__(
        self,
        block: bytes,
        header_list_size: int,
        message: bytes,
        deadline: float | None,
        wake: Callable[[], object],
    ) -> None:
        self.id = 0
        self.block = block
        self.header_list_size = header_list_size
        self.message = message
        self.deadline = math.inf if deadline is None else deadline
        self.wake = wake
        self.response = Response()
        self.outcome: bytes | Exception | None = None
        # Bytes of DATA that may be sent (section 5.2). It may be negative.
        self.send_window = 0
        # Bytes of received padding that no WINDOW_UPDATE has returned yet.
        self.padding = 0
        # The rest of the request. It waits for a window or for the socket.
        self.unsent: memoryview | None = None

    def time_left(self, now: float) -> float | None:
        """Return the seconds from *now* until the deadline, or None for no limit."""
        return None if self.deadline == math.inf else max(0.0, self.deadline - now)

    def __repr__(self) -> str:
        state = "open" if self.outcome is None else "ended"
        return f"<Stream {self.id} {state}>"
