"""What holds after every change of the state, whichever came before."""

from __future__ import annotations

from itertools import product
from random import Random

import attrs
from hypothesis import given, note, settings
from hypothesis.strategies import binary, sampled_from

from fastapi_topaz import ConnectionPool
from fastapi_topaz._entry import Lease
from fastapi_topaz._snapshot import connection_statuses
from fastapi_topaz._state import RAMP, PoolState
from fastapi_topaz.exceptions import ConnectFailed


OPERATIONS = []
"""Each as often as it weighs."""


def operation(weight, possible=lambda books: True):
    def register(method):
        method.possible = possible
        OPERATIONS.extend([method] * weight)
        return method

    return register


class Link:
    lost = False

    def is_lost(self):
        return self.lost


class Books:
    """Kept beside a state that is driven by all that a runtime does to it."""

    def __init__(self, maximum, minimum, streams, prompt, spreads):
        options = ConnectionPool(
            min_connections=min(minimum, maximum),
            max_connections=maximum,
            streams_per_connection=streams,
            max_idle_time=20,
            max_lifetime=60,
        ).options
        self.state = PoolState(options, Random(0).random, spreads=spreads)
        # Whether the host's tasks run after each change, or when it is their turn.
        self.prompt = prompt
        self.now = 0.0
        self.queue, self.holders, self.held = [], set(), []
        self.entries, self.closing, self.gone, self.probing = [], [], [], []
        self.size, self.abandoned = 0, False

    def do(self, operation, number):
        """Do *operation*, if it is possible, to what *number* chooses."""
        if operation.possible(self):
            self.number = number
            operation(self)
            note(f"{operation.__name__} {number}: {self.state.status()}")
            self.check()

    def one_of(self, things):
        self.number, which = divmod(self.number, len(things))
        return things[which]

    @property
    def usable(self):
        return [entry for entry in self.state.open if entry.retired is None]

    @property
    def under_way(self):
        # In an order, unlike a set.
        return [entry for entry in self.entries if entry in self.state.connecting]

    # -- what a runtime does of itself ----------------------------------------------

    def settle(self):
        self.lend()
        self.state.rotate()
        served = self.state.serve(len(self.holders), self.now)
        assert served == self.queue[: len(served)], "first come, first served"
        del self.queue[: len(served)]
        self.serve(served)
        if self.prompt:
            self.host()

    def serve(self, served):
        assert self.holders.issuperset(served), "nobody is served without a token"
        assert not any(lease.entry.connection.lost for lease in served)
        self.held += served

    def lend(self):
        """Lend tokens as the limiter does: in the order of those who wait."""
        for lease in self.queue:
            if len(self.holders) < self.state.options.capacity:
                self.holders.add(lease)

    def host(self):
        state = self.state
        for entry in state.to_close:
            assert entry not in self.closing + self.gone, "closed once"
            self.closing.append(entry)
        state.to_close.clear()
        for entry in state.to_probe:
            self.probe(entry)
        state.to_probe.clear()
        if state.attempts.overdue(self.now) or state.room() <= 0:
            self.dismiss_hopeless()
        assert state.attempts.next_overdue() > self.now
        for _ in range(state.shortfall(len(self.holders), self.now)):
            assert state.room() > 0
            coming = state.attempts.coming(waiting=bool(state.waiting))
            cautious = state.attempts.is_cautious(self.now)
            assert coming < (1 if cautious else max(RAMP, len(self.usable)))
            self.entries.append(state.attempts.begin(self.now))
        assert not state.shortfall(len(self.holders), self.now), "none is left over"

    def probe(self, entry):
        if entry.retired is None and not entry.probing:
            entry.probing = True
            self.probing.append(entry)

    def connections_changed(self):
        self.dismiss_hopeless()
        self.settle()

    def dismiss_hopeless(self):
        if self.state.hopeless(self.now):
            assert self.state.attempts.failures
            assert not self.usable
            assert all(entry.overdue for entry in self.state.connecting)
            self.dismiss()

    def dismiss(self):
        assert self.state.fail_waiting(ConnectFailed("no")) == self.queue
        self.holders.difference_update(self.queue)
        self.queue.clear()

    def ended(self, entry):
        self.entries.remove(entry)
        self.gone.append(entry)

    # -- callers ----------------------------------------------------------------------

    @operation(8, lambda books: not books.state.shut)
    def acquire(self):
        lease = Lease()
        token = len(self.holders) < self.state.options.capacity
        if token and self.state.take(lease, self.now):
            assert not self.queue, "a newcomer passes nobody"
            self.holders.add(lease)
            self.serve([lease])
        else:
            self.state.enqueue(lease)
            self.queue.append(lease)
            self.settle()

    @operation(1, lambda books: not books.state.shut)
    def acquire_without_waiting(self):
        self.state.want_one()
        self.settle()

    @operation(10, lambda books: books.held)
    def give_back(self):
        lease = self.one_of(self.held)
        self.held.remove(lease)
        self.state.give_back(lease, self.now)
        self.holders.remove(lease)
        self.settle()

    @operation(4, lambda books: books.queue or books.held)
    def withdraw(self):
        """Time out or be cancelled, also in the moment of being served."""
        lease = self.one_of(self.queue + self.held)
        self.state.withdraw(lease, self.now)
        (self.queue if lease in self.queue else self.held).remove(lease)
        self.holders.discard(lease)
        self.settle()

    @operation(4, lambda books: books.state.open)
    def call_ends(self):
        """Its connection may not have outlived it."""
        state, entry = self.state, self.one_of([*self.state.open, *self.gone[-1:]])
        entry.proven_at = self.one_of([entry.proven_at, self.now])
        self.one_of([state.suspect, state.broke, state.timed_out])(entry, self.now)
        self.settle()

    # -- connections ------------------------------------------------------------------

    @operation(12, lambda books: books.state.connecting)
    def attempt_succeeds(self):
        entry = self.one_of(self.under_way)
        self.state.connected(entry, Link(), self.now)
        self.connections_changed()

    @operation(3, lambda books: books.state.connecting)
    def attempt_fails(self):
        entry = self.one_of(self.under_way)
        self.ended(entry)
        how = self.one_of(["error", "error", "permanent error", "cancelled"])
        if how == "cancelled":
            self.state.attempts.cancelled(entry)
        else:
            error = ConnectFailed("no", permanent=how == "permanent error")
            self.state.connect_failed(entry, error, self.now)
        self.connections_changed()

    @operation(10, lambda books: books.probing)
    def probe_ends(self):
        entry = self.one_of(self.probing)
        self.probing.remove(entry)
        if self.one_of([True, False]):
            self.state.answered(entry, self.now)
        elif entry.retired is None:
            self.state.unanswered(entry, self.now)
        entry.probing = False
        self.connections_changed()

    @operation(2, lambda books: books.state.open)
    def other_side_hangs_up(self):
        self.one_of([*self.state.open]).connection.lost = True
        if self.one_of([True, False]):
            for entry in [*self.state.open]:
                news = entry.connection.lost and entry.retired is None
                assert self.state.look_at(entry, self.now) == news
            self.connections_changed()

    @operation(10, lambda books: books.closing)
    def closing_ends(self):
        entry = self.one_of(self.closing)
        self.closing.remove(entry)
        self.state.closed(entry)
        self.ended(entry)
        self.settle()

    # -- upkeep -----------------------------------------------------------------------

    @operation(10)
    def time_passes(self):
        self.now += self.one_of([0.0, 0.01, 0.1, 1.0, 2.0, 5.0, 30.0, 90.0])
        if self.one_of([True, False]):
            self.host()

    @operation(2, lambda books: books.state.open)
    def check_health(self):
        for entry in self.state.open:
            if not entry.suspect:
                self.probe(entry)

    @operation(3, lambda books: books.state.open)
    def reap(self):
        self.state.reap(self.now)
        self.settle()

    @operation(2, lambda books: books.state.open)
    def rotate(self):
        rotation = self.state.rotation
        if self.one_of([True, False]):
            rotation.drain(self.state.open)
        rotation.expire(self.state.open, self.now)
        assert rotation.next_at(self.state.open) > self.now
        self.settle()

    @operation(1)
    def resize(self):
        maximum = self.one_of([4, 3, 2, 1, 5])
        minimum = self.one_of(range(maximum))
        limits = {"min_connections": minimum, "max_connections": maximum}
        self.state.resize(attrs.evolve(self.state.options, **limits))
        self.connections_changed()

    @operation(1, lambda books: len(books.gone) > 6 and not books.state.shut)
    def shut_down(self):
        self.state.shut_down()
        self.dismiss()
        self.settle()

    # -- what holds -------------------------------------------------------------------

    def check(self):
        self.each_entry_is_in_one_place()
        self.each_lease_is_counted()
        self.what_may_be_leased_is_ready()
        self.nobody_waits_in_vain()
        self.the_status_adds_up()

    def each_entry_is_in_one_place(self):
        state = self.state
        places = (state.connecting, state.open, state.closing)
        for entry in self.entries:
            assert sum(entry in place for place in places) == 1
        assert sum(map(len, places)) == len(self.entries)
        # A lower maximum holds for what comes, not for what is there.
        assert len(self.entries) <= max(state.options.max_connections, self.size)
        self.size = len(self.entries)
        to_close = state.to_close + self.closing
        assert len(to_close) == len(set(to_close)), "closed once"
        assert set(to_close) == state.closing

    def each_lease_is_counted(self):
        leased = [lease.entry for lease in self.held]
        assert self.state.in_use == len(leased)
        for entry in self.entries:
            assert entry.leases == leased.count(entry) <= self.state.streams
        closed = self.state.closing.intersection(leased)
        assert self.abandoned or not closed, "closed under a caller"
        assert list(self.state.waiting) == self.queue

    def what_may_be_leased_is_ready(self):
        state = self.state
        for entry in state.open:
            well = not entry.suspect and entry.retired is None
            assert (entry in state.ready) == (well and entry.leases < state.streams)
            assert entry.leases or entry.retired is None, "closed when it is idle"
            if entry.suspect and entry.retired is None:
                assert entry in state.to_probe + self.probing, "a probe decides"
        assert state.ready.keys() <= state.open.keys()
        maximum = 0 if state.shut else state.options.max_connections
        assert len(self.usable) <= maximum

    def nobody_waits_in_vain(self):
        state = self.state
        if not state.waiting or len(self.holders) <= state.in_use:
            return
        assert not state.ready
        if state.room() > 0:
            wanted = state.shortfall(len(self.holders), self.now)
            coming = not all(entry.overdue for entry in state.connecting)
            assert coming or wanted or state.next_attempt() > self.now
        else:
            suspects = any(entry.suspect for entry in state.open)
            assert state.connecting or state.closing or suspects or state.in_use

    def the_status_adds_up(self):
        state = self.state
        status = state.status()
        conditions = [x.condition for x in connection_statuses(state, self.now)]
        well = conditions.count("idle") + conditions.count("busy")
        assert status.total == status.idle + status.busy == len(conditions)
        assert status.busy == len({x.entry for x in self.held} & state.open.keys())
        assert status.suspect == conditions.count("suspect")
        assert status.leaving == conditions.count("leaving")
        assert status.healthy_connections == well
        assert status.waiting == len(self.queue)
        assert status.streams_in_use == len(self.held)
        assert status.connecting == len(self.under_way)
        assert status.healthy == (well > 0 or not status.failing)


SETUPS = [*product((4, 3, 2, 1), (0, 1, 2), (1, 2, 3), (True, False), (False, True))]


@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
)
# As few draws as possible: of many that look alike, Hypothesis makes variations of a
# few examples instead of new ones.
@given(setup=sampled_from(SETUPS), script=binary(min_size=150, max_size=250))
def test_the_books_are_right_after_any_operations_in_any_order(setup, script):
    books = Books(*setup)
    for code, number in zip(script[::2], script[1::2], strict=False):
        if code:  # 0 is what a failing example is made simpler with
            books.do(OPERATIONS[code % len(OPERATIONS)], number)
    close(books)


def close(books):
    """Whatever happened, nothing may be left."""
    state = books.state
    books.shut_down()
    books.check()
    for entry in books.under_way[::2]:
        state.connected(entry, Link(), books.now)
    for entry in books.under_way:
        state.attempts.cancelled(entry)
        books.ended(entry)
    for lease in books.held[::2]:
        books.held.remove(lease)
        state.give_back(lease, books.now)
    books.check()
    state.abandon()
    books.abandoned = True
    books.check()
    assert not state.open
    for lease in books.held:
        state.give_back(lease, books.now)
    books.host()
    for entry in books.closing:
        state.closed(entry)
        books.ended(entry)
    assert not books.entries, "each one was closed"
    assert state.rotation.is_idle()
    assert not any((state.open, state.connecting, state.closing, state.waiting))
    assert state.in_use == 0
