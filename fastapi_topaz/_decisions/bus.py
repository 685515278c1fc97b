"""
Invalidations that go to the caches of other processes, and come from them.

The bus may lose, repeat and reorder messages, and may be down. So each process sends a
message every few seconds, also if nothing is invalidated, and the bus must return it.
While that happens, and no number of another process is missing, no invalidation was
lost. Otherwise the cache is cleared, and while it does not happen, answers end early.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import random
from collections import OrderedDict, deque
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, Literal, Protocol

import anyio

from fastapi_topaz._decisions.seal import (
    MOST_TAGS,
    Message,
    Seal,
    Senders,
    Unreadable,
    derived,
)
from fastapi_topaz._decisions.tags import Tagger
from fastapi_topaz._error_text import error_kind
from fastapi_topaz._fork import current as process
from fastapi_topaz._log_limit import LogLimit
from fastapi_topaz._pool.interrupts import protected
from fastapi_topaz._pool.owner_loop import OwnerLoop


if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from fastapi_topaz._decisions.sharing import Freshness
    from fastapi_topaz._decisions.store import Ages


__all__ = ["BusLink", "BusStatus", "InvalidationBus", "checked_bus"]


logger = logging.getLogger("fastapi_topaz.decisions")

LEAST_KEY = 16
"""Bytes of a key."""

MOST_WAITING = 1000
"""Invalidations that wait to be sent. One more, and one for everything replaces them"""

PATIENCE = (1.0, 15.0)
"""The limits of the seconds without an own message after which the bus is down."""

FIRST_PAUSE = 0.1
"""Seconds before the first repetition. Each further pause is twice as long."""

MOST_AWAITED = 1000
"""Own messages that have not come back, of which the time is remembered."""

FLUSH = 1.0
"""Seconds to send what waits as the pool closes."""


class InvalidationBus(Protocol):
    """
    Carries invalidations between processes, for `DecisionCache(invalidation_bus=...)`.

    A message is a sequence of tags: `bytes` of 16 each, which are keyed hashes. A bus
    passes them on unchanged, together and in their order. It need not be reliable: it
    may lose, repeat and reorder messages. It must also return a process its own ones.
    `examples/redis_bus.py` has one for Redis.
    """

    async def publish(self, tags: Sequence[bytes], /) -> None:
        """
        Send *tags* to all processes that receive, also to this one.

        It is cancelled if it takes longer than a few seconds.

        Raises:
            Exception: They could not be sent. They are sent again later.
        """
        ...

    async def receive(self, deliver: Callable[[Sequence[bytes]], object], /) -> None:
        """
        Subscribe, and call *deliver* with the tags of each message, until cancelled.

        The pool runs this in a task, from its opening to its closing. *deliver* never
        raises, and may be called in any thread.

        Raises:
            Exception: The bus cannot be reached. This is called again after a pause.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BusStatus:
    """
    A snapshot of the connection to other processes, in `CacheStatus.bus`.

    Attributes:
        state: `reachable`: this process receives its own messages. `unreachable`: it
            does not, or the pool is not open. Then answers live at most
            `denied_ttl_seconds`.
        published: The messages sent.
        failed: The messages that could not be sent.
        waiting: The invalidations that are still to be sent.
        received: The messages received that could be read, also its own.
        ignored: Those of them that came twice or too late.
        rejected: The messages received that could not be read.
        gaps: How often messages of another process were missing.
        outages: How often the bus became unreachable.
        clears: How often the cache was cleared, after a gap or an outage, because
            another process was new, or because one had cleared its own.
    """

    state: Literal["reachable", "unreachable"]
    published: int
    failed: int
    waiting: int
    received: int
    ignored: int
    rejected: int
    gaps: int
    outages: int
    clears: int


class BusLimits:
    """
    How old answers may be, which depends on whether the bus is reachable now.

    Args:
        usual: The limits while it is.
        is_reachable: Whether it is.
    """

    __slots__ = ("_is_reachable", "_usual", "jitter", "longest")

    def __init__(self, usual: Ages, is_reachable: Callable[[], bool]) -> None:
        self._usual, self._is_reachable = usual, is_reachable
        self.jitter, self.longest = usual.jitter, usual.longest

    def _limited(self, seconds: float) -> float:
        return seconds if self._is_reachable() else min(seconds, self._usual.denied)

    @property
    def allowed(self) -> float:
        return self._limited(self._usual.allowed)

    @property
    def denied(self) -> float:
        return self._usual.denied

    @property
    def stale(self) -> float:
        return self._limited(self._usual.stale)

    def ttl(self, allowed: bool) -> float:
        return self.allowed if allowed is True else self.denied


class BusLink:
    """
    Connects one cache with a bus. `run` runs while the pool of the cache is open.

    Args:
        bus: The bus.
        key: The key of the application. It is not kept.
        usual: How old answers may be while the bus is reachable.
        clear: Clears the cache of this process only.

    Attributes:
        freshness: Has the invalidations and the clock. Set by the cache.
    """

    freshness: Freshness

    def __init__(
        self, bus: InvalidationBus, key: bytes, usual: Ages, clear: Callable[[], None]
    ) -> None:
        self._bus, self._clear_cache = bus, clear
        self._seal = Seal(key)
        self.tagger = Tagger(derived(key, b"topaz bus tags"))
        self.limits = BusLimits(usual, self.is_reachable)
        self._denied = usual.denied
        self.patience = min(max(PATIENCE[0], usual.denied), PATIENCE[1])
        self._interval = self.patience / 3
        self._limit = LogLimit(logger, "invalidation bus")
        self._counts = dict.fromkeys(
            (
                *("published", "failed", "received", "ignored", "rejected"),
                *("gaps", "outages", "clears"),
            ),
            0,
        )
        # The pools of this cache, by the loops they are open in. The first one runs.
        self._turns: list[OwnerLoop] = []
        self._pid = process.pid
        self._outbox: deque[frozenset[bytes]] = deque()
        # Whether one that was in the outbox is being sent.
        self._is_sending = False
        self._reset()

    def _reset(self) -> None:
        """Begin as a new sender, without any knowledge of the bus."""
        self._owner: OwnerLoop | None = None
        self._sender = os.urandom(16)
        self._beat = self._number = 0
        self._senders = Senders()
        # When a message was sent whose return proved that the bus works.
        self._confirmed_at = -math.inf
        # Messages of our own that were sent before prove nothing.
        self._trusted_from = -math.inf
        # When each message was sent that has not come back.
        self._awaited: OrderedDict[int, float] = OrderedDict()
        self._is_up = False
        self._down_since = self._subscribed_at = -math.inf
        self._subscription: object = None
        # Not made here, because there may be no event loop yet.
        self._receiving: anyio.CancelScope | None = None
        self._waking: anyio.Event | None = None

    # -- state ------------------------------------------------------------------------

    def is_reachable(self) -> bool:
        """Return whether every invalidation before the last moments has arrived."""
        # Computed on demand: after the loop was blocked, a request may run first.
        age = self.freshness.clock() - self._confirmed_at
        return 0.0 <= age < self.patience and self._pid == process.pid

    def status(self) -> BusStatus:
        """Return a snapshot of the numbers. Never raises."""
        return BusStatus(
            state="reachable" if self.is_reachable() else "unreachable",
            waiting=self._waiting() if self._pid == process.pid else 0,
            **self._counts,
        )

    def _waiting(self) -> int:
        return len(self._outbox) + self._is_sending

    def _clear(self) -> None:
        self._counts["clears"] += 1
        self._clear_cache()

    def _go_down(self, reason: str) -> None:
        """Record that the bus is unreachable, and why."""
        self._confirmed_at = -math.inf
        if self._is_up:
            self._is_up = False
            self._counts["outages"] += 1
            self._down_since = self.freshness.clock()
        self._limit.report(
            logging.WARNING,
            reason,
            "the invalidation bus is unreachable (%s): answers live at most %g s, and "
            "%d invalidations wait to be sent",
            *(reason, self._denied, self._waiting()),
        )

    def _confirm(self, beat: int) -> None:
        """Note that the own message *beat* has come back."""
        now, sent_at = self.freshness.clock(), self._awaited.pop(beat, None)
        if sent_at is None:
            self._counts["ignored"] += 1
            return
        while self._awaited and next(iter(self._awaited)) < beat:
            self._awaited.popitem(last=False)
        if sent_at < self._trusted_from or not 0.0 <= now - sent_at < self.patience:
            return
        if self._is_up and not self.is_reachable():
            self._go_down("no message came back")
        if not self._is_up:
            # What was asked before may have been invalidated meanwhile.
            self._is_up = True
            self._clear()
            self._limit.report(
                logging.INFO,
                "reachable",
                "the invalidation bus is reachable; the cache was cleared",
                all_counts=True,
            )
            self._wake()
        self._confirmed_at = max(self._confirmed_at, sent_at)

    # -- invalidations ----------------------------------------------------------------

    def announce(self, concerned: list[frozenset[bytes]]) -> None:
        """Send invalidations to other processes, soon. Thread-safe, never raises."""
        self._forget_parent()
        for tags in concerned:
            sent = frozenset(sorted(tags)[:MOST_TAGS]) or {self.tagger.everything}
            if len(self._outbox) >= MOST_WAITING:
                self._outbox.clear()
                sent = {self.tagger.everything}
            self._outbox.append(frozenset(sent))
        owner = self._owner
        if owner is not None:
            owner.call_soon(self._wake)
            return
        self._limit.report(
            logging.WARNING,
            "not open",
            "%d invalidations wait to be sent to other processes until the pool is "
            "open: use the lifespan, or `async with pool`",
            len(self._outbox),
        )

    def _wake(self) -> None:
        if self._waking is not None:
            self._waking.set()

    def _forget_parent(self) -> None:
        if self._pid != process.pid:
            # What waits here also waits in the parent, which sends it.
            self._pid, self._outbox = process.pid, deque()
            self._is_sending = False
            self._reset()

    def _deliver(self, subscription: object, parts: object) -> None:
        owner = self._owner
        if subscription is not self._subscription or owner is None:
            return
        if get_ident() != owner.thread:
            owner.call_soon(partial(self._deliver, subscription, parts))
            return
        try:
            message = self._seal.open(parts)
        except Exception as error:  # noqa: BLE001  (parts may be of any class)
            self._reject(str(error) if isinstance(error, Unreadable) else "no sequence")
            return
        self._counts["received"] += 1
        if message.sender == self._sender:
            self._confirm(message.beat)
            return
        heard = self._senders.hear(message)
        if heard == "old":
            self._counts["ignored"] += 1
        elif heard == "gap":
            self._counts["gaps"] += 1
            self._clear()
            self._limit.report(
                logging.WARNING,
                "gap",
                "the invalidation bus has lost messages of another process; the cache "
                "was cleared",
            )
        elif heard == "joined" or self.tagger.everything in message.tags:
            self._clear()
        elif message.tags:
            now = self.freshness.clock()
            self.freshness.invalidations.invalidate([message.tags], now)

    def _reject(self, reason: str) -> None:
        """Trust the bus no more for a while: the message may have been important."""
        self._counts["rejected"] += 1
        self._trusted_from = self.freshness.clock() + self.patience
        self._go_down(f"a message cannot be read: {reason}")

    # -- tasks ------------------------------------------------------------------------

    @protected
    async def run(self) -> None:
        """Receive and send until cancelled. Then send what waits, for a moment."""
        owner = OwnerLoop()
        self._turns.append(owner)
        try:
            await self._turn(owner)
            self._forget_parent()
            self._reset()
            self._owner = owner
            # Shielded: while the rest is sent, a bus may need its connection.
            listening = anyio.CancelScope(shield=True)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._listen, listening)
                try:
                    await self._speak()
                finally:
                    try:
                        with anyio.move_on_after(FLUSH, shield=True):
                            while self._outbox and await self._send():
                                pass
                    finally:
                        # Also if asyncio cancels the task a second time.
                        listening.cancel()
        finally:
            if self._owner is owner:
                self._reset()
                if self._outbox:
                    logger.warning(
                        "the invalidation bus: %d invalidations were not sent to other "
                        "processes before the pool closed; they wait for its next "
                        "opening",
                        len(self._outbox),
                    )
                self._limit.flush(everything=True)
            # Last: from here on, another thread may run this.
            self._leave(owner)

    async def _turn(self, owner: OwnerLoop) -> None:
        """Wait until no other pool of this cache runs this, also in other threads."""
        while (first := self._turns[0]) is not owner:
            if first.is_forked() or first.is_closed():
                # It ended without its tasks: they belong to the parent process, or
                # asyncio has closed their loop.
                self._leave(first)
            else:
                await anyio.sleep(self._interval)

    def _leave(self, owner: OwnerLoop) -> None:
        with contextlib.suppress(ValueError):
            self._turns.remove(owner)

    @protected
    async def _listen(self, listening: anyio.CancelScope) -> None:
        """Subscribe, and subscribe again after each end."""
        pause = FIRST_PAUSE
        with listening:
            while True:
                self._subscription = token = object()
                self._senders = Senders()
                self._awaited.clear()
                self._subscribed_at = self.freshness.clock()
                deliver = partial(self._deliver, token)
                reason: str | None = None
                with anyio.CancelScope() as receiving:
                    self._receiving = receiving
                    reason = await _apart(self._bus.receive, deliver)
                if receiving.cancelled_caught:
                    reason = "no message came back"
                self._subscription = None
                pause = FIRST_PAUSE if self._is_up else min(self._interval, 2 * pause)
                self._go_down(reason or "receive() has ended")
                # Not all processes at once, after the bus was restarted.
                await anyio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311

    async def _speak(self) -> None:
        """Send invalidations at once, and a message without any at each interval."""
        pause = FIRST_PAUSE
        while True:
            self._look()
            self._waking = waking = anyio.Event()
            sent = await self._send()
            if sent and self._outbox:
                continue
            pause = FIRST_PAUSE if self._is_up else min(self._interval, 2 * pause)
            if not sent:
                await anyio.sleep(pause)
                continue
            with anyio.move_on_after(self._interval if self._is_up else pause):
                await waking.wait()

    def _look(self) -> None:
        """Notice that no message came back."""
        now = self.freshness.clock()
        if self._is_up and not self.is_reachable():
            self._go_down("no message came back")
        began = max(self._subscribed_at, self._down_since, self._trusted_from)
        is_silent = not self._is_up and now - began >= 2 * self.patience
        if is_silent and self._receiving is not None:
            # The subscription may be dead without an error.
            self._receiving.cancel()

    async def _send(self) -> bool:
        """Send the invalidation that waits for longest, or a message without one."""
        tags = frozenset[bytes]()
        # Another thread may just replace all that waits.
        with contextlib.suppress(IndexError):
            tags = self._outbox.popleft()
        # Used up even if it fails: it may have been sent all the same.
        self._beat, self._number = self._beat + 1, self._number + bool(tags)
        message = Message(self._sender, self._beat, self._number, tags)
        self._awaited[self._beat] = self.freshness.clock()
        if len(self._awaited) > MOST_AWAITED:
            self._awaited.popitem(last=False)
        reason: str | None = "cancelled"
        self._is_sending = bool(tags)
        try:
            with anyio.move_on_after(self.patience) as scope:
                parts = self._seal.close(message)
                reason = await _apart(self._bus.publish, parts)
            if scope.cancelled_caught:
                reason = f"no answer within {self.patience:g} s"
        finally:
            self._is_sending = False
            if reason is not None and tags:
                self._outbox.appendleft(tags)
        self._counts["published" if reason is None else "failed"] += 1
        if reason is not None:
            self._limit.report(
                logging.WARNING,
                f"not sent: {reason}",
                "a message to the invalidation bus was not sent (%s): %d invalidations "
                "wait to be sent to other processes",
                *(reason, len(self._outbox)),
            )
        return reason is None


async def _apart(function: Callable[..., Awaitable[None]], argument: Any) -> str | None:
    """
    Await *function* in a task of its own, so that it can cancel no other one.

    Returns:
        None if it returned. Otherwise a short reason without the text of the error,
        which may have the URL of the bus with its password.
    """
    ends: list[str | None] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_call, function, argument, ends)
    return ends[0] if ends else "it cancelled itself"


@protected
async def _call(
    function: Callable[..., Awaitable[None]], argument: Any, ends: list[str | None]
) -> None:
    try:
        await function(argument)
    except BaseException as error:  # noqa: BLE001  (a bus may raise anything)
        if (ending := _ending(error)) is not None:
            raise ending from None
        ends.append(error_kind(_first(error)))
    else:
        ends.append(None)


def _ending(error: BaseException) -> BaseException | None:
    """
    Return what of *error* must leave the task of the bus: the end of the task.

    All else must not end the pool: the panic of a client in Rust, which is no
    `Exception`, and an error that a client has as it is cancelled.
    """
    group = BaseExceptionGroup("", [error])
    if group.subgroup((KeyboardInterrupt, SystemExit, GeneratorExit)) is not None:
        return error
    cancelled = group.subgroup(anyio.get_cancelled_exc_class())
    return None if cancelled is None else _first(cancelled)


def _first(error: BaseException) -> BaseException:
    """Return the first error in a group, because clients on anyio raise groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def checked_bus(bus: object, key: object) -> None:
    """
    Check the arguments of a cache for a bus.

    Raises:
        TypeError, ValueError: One is missing or wrong. The message shows no key.
    """
    if bus is None:
        if key is not None:
            raise TypeError("invalidation_key needs an invalidation_bus")
        return
    methods = (getattr(bus, name, None) for name in ("publish", "receive"))
    if isinstance(bus, type) or not all(map(callable, methods)):
        raise TypeError(
            "invalidation_bus must have the coroutine methods publish() and receive() "
            f"of InvalidationBus, got {type(bus).__name__}"
        )
    if not isinstance(key, bytes):
        raise TypeError(
            "invalidation_bus needs an invalidation_key, a secret of bytes that all "
            f"processes share, got {type(key).__name__}"
        )
    if len(key) < LEAST_KEY:
        raise ValueError(
            f"invalidation_key must have at least {LEAST_KEY} bytes, got {len(key)}: "
            "make one with `secrets.token_bytes(32)`"
        )
