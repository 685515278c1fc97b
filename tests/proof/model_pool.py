"""A pool, its callers and its server: the objects that `test_model_pool` acts on."""

from __future__ import annotations

import contextlib
import itertools
import math
from functools import partial

import anyio
import anyio.lowlevel
from hypothesis.stateful import RuleBasedStateMachine

from fastapi_topaz import (
    ConnectFailed,
    ConnectionLost,
    ConnectionPool,
    PoolClosed,
    PoolError,
    PoolSaturated,
    PoolTimeout,
)
from fastapi_topaz.testing import FakeConnector, ok
from kit.invariants import EVERYWHERE, check
from kit.invariants_pool import OF_AN_OPEN_POOL, OF_THE_POOL
from proof.stepwise import OnAsyncio


def at_once(coroutine):
    """Run a coroutine that never waits."""
    with contextlib.suppress(StopIteration):
        coroutine.send(None)
        raise AssertionError("it waited")


class Server(FakeConnector):
    """The records of the server, independent of the pool."""

    spreads = True

    def __init__(self):
        super().__init__()
        self.connecting = self.closing = self.failures = self.given_up = 0
        self.refusals = []
        self.closes = "at once"
        self.refused_probes = []

    async def connect(self, timeout):
        self.connecting += 1
        try:
            conn = await super().connect(timeout)
        except ConnectFailed:
            self.failures += 1
            self.refusals.append(anyio.current_time())
            raise
        except BaseException:
            self.given_up += 1
            raise
        finally:
            self.connecting -= 1
        conn.close = partial(self._close, conn)
        conn.probe = partial(self._probe, conn, conn.probe)
        conn.was_unwell = False
        return conn

    async def _probe(self, conn, probe, timeout):
        if conn.refuses:
            self.refused_probes.append(anyio.current_time())
        await probe(timeout)

    async def _close(self, conn, grace):
        conn.closed += 1
        self.closing += 1
        try:
            if self.closes == "never":
                await anyio.sleep_forever()
            await anyio.lowlevel.checkpoint()
            if self.closes == "with an error":
                raise OSError("cannot close")
        finally:
            self.closing -= 1

    @property
    def is_well(self):
        bad = any(x.frozen or x.refuses or not x.alive for x in self.open)
        return self.default == ok() and self.closes == "at once" and not bad


class Caller:
    """One call of acquire() in its own task, and its outcome."""

    number = conn = claim = outcome = ended = None
    released = cancelled = calling = came_closed = met_leases = False
    came_at, deadline = 0.0, math.inf

    def __init__(self, books, timeout, budget=None):
        self.books, self.timeout, self.budget = books, timeout, budget
        self.scope = anyio.CancelScope()
        self.leave = anyio.Event()
        self.last_words = False

    def __repr__(self):
        return f"<caller {self.number} timeout={self.timeout} {self.outcome!r}>"

    @property
    def waits(self):
        return self.number is not None and self.conn is None and self.outcome is None

    @property
    def holds(self):
        return self.conn is not None and not self.released

    async def run(self):
        books = self.books
        self.number, self.came_at = next(books.numbers), books.now
        self.deadline = self.came_at + min(self.timeout, self.budget or math.inf)
        self.came_closed = books.phase in {"closing", "closed"}
        if books.phase == "new":
            books.opened()
        if books.open_pool is not None:
            self.met_leases = books.state.in_use > 0
        try:
            with self.scope:
                await self._claim()
            self.outcome = "served" if self.conn else "cancelled"
        except PoolError as error:
            self.outcome = error
        except anyio.get_cancelled_exc_class():
            self.outcome = "served" if self.conn else "cancelled"
        self.ended = books.now
        books.ended_now.append(self)
        if self.conn is None:
            books.outcomes[COUNTERS[type(self.outcome)]] += 1
        elif not self.released:
            self.give_back()

    async def _claim(self):
        acquire = self.books.pool.acquire(timeout=self.timeout, budget=self.budget)
        async with acquire as conn:
            self.conn, self.claim = conn, conn._claim
            self.deadline = math.inf
            self.epoch = self.books.epoch
            self.books.came[self.claim] = self.number
            self.books.served_now.append(self.claim)
            self.books.outcomes["acquisitions"] += 1
            await self.leave.wait()
            if self.last_words:
                self.calling = True
                with contextlib.suppress(
                    ConnectionLost, ConnectionRefusedError, TimeoutError, PoolError
                ):
                    await conn.call("/a/b", b"", timeout=2)
                self.calling = False

    def give_back(self):
        self.released = True
        self.books.given_back.append(self.conn)


COUNTERS = {
    str: "cancelled",
    PoolTimeout: "timeouts",
    PoolSaturated: "rejected",
    ConnectFailed: "failed",
    PoolClosed: "closed",
}


class PoolBooks(RuleBasedStateMachine):
    """A pool, its callers and its server, and the records of all of them."""

    driver = OnAsyncio
    make_pool = ConnectionPool
    steps = 0

    def __init__(self):
        super().__init__()
        self.driver = type(self).driver()
        self.server = Server()
        self.is_well = True
        self.callers, self.closers = [], []
        self.numbers = itertools.count(1)
        self.outcomes = dict.fromkeys(COUNTERS.values(), 0) | {"acquisitions": 0}
        self.came, self.unfit = {}, set()
        self.served_now, self.ended_now, self.given_back = [], [], []
        self.number_before = self.tokens_before = 0
        self.declared_before, self.declared_at = False, math.inf
        self.phase, self.epoch = "new", 0
        # Steps since it was opened: a pool that is always closed shows few bugs.
        self.aged = 0
        self.closed_at, self.close_by = -math.inf, None
        self.well_for = self.looked_at = 0.0
        self.at_rest = True

    # -- the books -----------------------------------------------------------------

    @property
    def now(self):
        return self.driver.now()

    @property
    def open_pool(self):
        return self.pool._open_pool

    @property
    def state(self):
        return self.open_pool.state

    @property
    def should_be_open(self):
        return self.phase in {"open", "closing"}

    @property
    def grace_given(self):
        return self.close_by is not None

    @property
    def grace_is_over(self):
        return self.grace_given and self.now >= self.close_by

    @property
    def holders(self):
        return [caller for caller in self.callers if caller.holds]

    @property
    def waiters(self):
        waiters = [caller for caller in self.callers if caller.waits]
        return sorted(waiters, key=lambda caller: caller.number)

    @property
    def held(self):
        return [caller.claim for caller in self.holders if caller.epoch == self.epoch]

    @property
    def queue(self):
        return [caller.claim for caller in self.waiters]

    @property
    def tokens(self):
        return self.open_pool.limiter.borrowed_tokens

    def pools_tasks(self):
        return self.driver.others()

    def timers(self):
        return self.driver.timers() and not any(x.calling for x in self.callers)

    def opened(self):
        self.phase, self.close_by = "open", None
        self.epoch += 1
        self.aged = 0
        self.number_before = self.tokens_before = 0
        self.unfit = set()
        self.declared_before = False
        self.server.refusals.clear()

    def look(self):
        """Check all invariants; called when all tasks wait."""
        passed = self.now - self.looked_at
        self.well_for = self.well_for + passed if self.server.is_well else 0.0
        self.looked_at = self.now
        if self.open_pool is None:
            check(self, OF_THE_POOL)
        else:
            self._who_is_who()
            check(self, EVERYWHERE, OF_AN_OPEN_POOL, OF_THE_POOL)
        self.callers = [x for x in self.callers if x.outcome is None or x.holds]
        self.came = {x.claim: x.number for x in self.callers}
        self.served_now, self.ended_now = [], []
        if self.open_pool is None:
            return
        state = self.state
        self.number_before = sum(
            map(len, (state.open, state.connecting, state.closing))
        )
        self.tokens_before = self.tokens
        if state.outage.declared and not self.declared_before:
            self.declared_at = self.now
        self.declared_before = state.outage.declared
        self.unfit = {
            x for x in state.open if x.retired is not None or x.connection.hung_up
        }

    def _who_is_who(self):
        """
        Find the leases of callers that have begun to wait: these are the last ones.
        """
        known = {caller.claim for caller in self.callers}
        unhandled_loss = [claim for claim in self.state.waiting if claim not in known]
        newcomers = [caller for caller in self.waiters if caller.claim is None]
        for caller, claim in zip(newcomers, unhandled_loss, strict=False):
            caller.claim = claim
            self.came[claim] = caller.number

    def do(self, *actions):
        """Run all *actions* in one tick."""
        self.is_well = False
        self.driver.step(*actions, look=self.look)
        type(self).steps += 1
        self.aged += 1
        self.is_well = True

    def one_of(self, number, things):
        return things[number % len(things)]

    # -- actions that can share one tick ----------------------------------------------

    def start_caller(self, timeout, budget=None):
        caller = Caller(self, timeout, budget)
        self.callers.append(caller)
        caller.native_cancel = self.driver.spawn(caller.run) or caller.scope.cancel

    def start_opening(self):
        async def opening():
            await self.pool.initialize()
            if self.phase != "open":
                self.opened()

        self.driver.spawn(opening)

    def start_closing(self, grace):
        scope = anyio.CancelScope()

        async def closing():
            epoch = self.epoch
            self.closed_at = self.now
            if self.should_be_open:
                self.phase = "closing"
                ends = self.now + grace
                self.close_by = min(ends, self.close_by if self.grace_given else ends)
            else:
                self.phase = "closed"
            with scope:
                await self.pool.close(grace)
            self.closers.remove(scope)
            if self.epoch == epoch:
                self.phase, self.close_by = "closed", None

        self.closers.append(scope)
        self.driver.spawn(closing)

    def release(self, caller):
        if caller.holds:
            caller.give_back()
            at_once(self.pool.release(caller.conn))
        caller.leave.set()

    def cancel(self, caller, *, natively):
        caller.cancelled = True
        (caller.native_cancel if natively else caller.scope.cancel)()

    def set_limits(self, least, most):
        if self.open_pool is not None:
            self.number_before = max(self.number_before, len(self.server.open))
            self.tokens_before = max(self.tokens_before, self.tokens)
        self.pool.resize(least, most)

    def action(self, number):
        """Return one of the immediate actions."""
        number, kind = divmod(number, 10)
        timeout = self.one_of(number, [1000, 0, 1000, 3, 0.5])
        if kind < 3 or not self.callers:
            return partial(self.start_caller, timeout)
        if kind < 6 and self.holders:
            return partial(self.release, self.one_of(number, self.holders))
        if kind < 8:
            caller = self.one_of(number, self.callers)
            return partial(self.cancel, caller, natively=kind == 7)
        if kind == 8:
            return partial(self.set_limits, 0, self.one_of(number, [2, 1, 3]))
        if number % 10 == 0:
            return partial(self.start_closing, self.one_of(number // 10, [0, 1, 10]))
        return self.pool.drain
