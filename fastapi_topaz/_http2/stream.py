"""One call on a connection: its stream, from the request to the outcome."""

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

    It has no id until it is opened: a call may have to wait for the stream limit of
    the peer, or for the socket. A stream that has an outcome is not in the connection.

    Args:
        block: The header block of the request.
        header_list_size: The size of its header list.
        message: The message of the request.
        deadline: When the call ends at the latest, by the clock of the I/O layer; None
            for no limit.
        wake: Called once, when `outcome` is there. It must not call the connection.
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
        # How many bytes of DATA may be sent (section 5.2). It may be negative.
        self.send_window = 0
        # Bytes of padding that took from the receive window and were not given back.
        self.padding = 0
        # The rest of the request, which waits for a window or for the socket.
        self.unsent: memoryview | None = None

    def time_left(self, now: float) -> float | None:
        """Return the seconds from *now* until the deadline, or None for no limit."""
        return None if self.deadline == math.inf else max(0.0, self.deadline - now)

    def __repr__(self) -> str:
        state = "open" if self.outcome is None else "ended"
        return f"<Stream {self.id} {state}>"
