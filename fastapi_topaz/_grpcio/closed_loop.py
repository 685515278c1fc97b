"""
Ends what gRPC has under way on an event loop that was closed.

gRPC passes the end of an operation to the event loop that began it. All loops of a
process share one queue of these events. If the loop is closed, passing one raises in
the loop that reads the queue. The operation then keeps its socket until the process
ends. What the loop had queued itself when it closed is lost. Nothing tells it from what
is under way, so what is not reported within `call_later` is taken to be lost.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

from grpc._cython import cygrpc

from fastapi_topaz._grpcio.call import DirectCall


if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["call_later", "take_last_events"]


def take_last_events(loop: Any) -> None:
    """Let *loop*, which is closed, take the ends of gRPC's operations."""
    end = getattr(cygrpc, "_handle_callback_wrapper", None)
    refuse = loop.call_soon_threadsafe

    def call_soon_threadsafe(
        function: Callable[..., Any], *args: Any, **more: Any
    ) -> Any:
        return function(*args) if function is end else refuse(function, *args, **more)

    if end is None or not loop.is_closed() or loop.call_soon is _call_now:
        return
    # A loop of another make may have no room for attributes.
    with contextlib.suppress(AttributeError):
        loop.call_soon_threadsafe = call_soon_threadsafe
        loop.call_soon = _call_now


def _call_now(callback: Callable[..., Any], *args: Any, **_more: Any) -> None:
    """Let calls of this package end. Tasks that wait for anything never go on."""
    if isinstance(getattr(callback, "__self__", None), DirectCall):
        callback(*args)


def call_later(delay: float, function: Callable[[], object]) -> None:
    """Call *function* after *delay* seconds, in a thread of its own."""
    timer = threading.Timer(delay, function)
    # It must not keep the process alive. A process that ends starts no thread, and
    # needs none.
    timer.daemon = True
    with contextlib.suppress(RuntimeError):
        timer.start()
