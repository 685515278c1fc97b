"""
The invariants of a real pool, besides the `invariants` of its state.

The other side has books too: the server counts what it sees, and each caller knows its
own results.
"""

from __future__ import annotations

from fastapi_topaz import (
    ConnectFailed,
    PoolClosed,
    PoolError,
    PoolSaturated,
    PoolTimeout,
)
from fastapi_topaz._pool.state.pool_state import RAMP
from fastapi_topaz._pool.state.slot import Check
from kit.invariants import holds, usable


OF_AN_OPEN_POOL = []
"""Invariants of a pool that is open or closing: it has an `OpenPool`, and a server."""

OF_THE_POOL = []
"""Invariants of a pool that may be open or closed."""


# -- an open pool, and its server -----------------------------------------------------


@holds(28, OF_AN_OPEN_POOL)
def the_server_has_what_the_pool_has(books):
    """The connections open at the server are exactly the connections of the pool."""
    ours = [slot.connection for slot in books.state.open]
    theirs = books.server.open
    if len(ours) != len(theirs) or any(conn not in theirs for conn in ours):
        return f"the pool has {ours}, the server {theirs}"
    return None


@holds(29, OF_AN_OPEN_POOL)
def the_server_sees_the_attempts(books):
    """As many attempts are pending at the server as the pool counts."""
    ours, theirs = len(books.state.connecting), books.server.connecting
    return f"the pool has {ours}, the server {theirs}" if ours != theirs else None


@holds(30, OF_AN_OPEN_POOL)
def the_server_sees_the_closings(books):
    """As many connections are being closed at the server as the pool counts."""
    ours, theirs = len(books.state.closing), books.server.closing
    if books.state.to_close or ours != theirs:
        return f"the pool closes {ours}, the server {theirs}"
    return None


@holds(31, OF_AN_OPEN_POOL)
def the_limiter_has_the_limit(books):
    """
    There are as many tokens as the limit, which is between 1 and the capacity. No
    caller is being dismissed.
    """
    open_pool, limit = books.open_pool, books.state.limit
    if open_pool.limiter.total_tokens != limit:
        return f"it has {open_pool.limiter.total_tokens} and not {limit}"
    if not 1 <= limit <= books.state.options.capacity:
        return f"it is {limit}"
    counted = open_pool.overload.explicit
    claims = [x for x in [*books.held, *books.queue] if x]
    explicit = sum(not isinstance(x, Check) for x in claims)
    if counted != explicit:
        return f"{counted} explicit leases are counted, and there are {explicit}"
    return f"{books.state.dismissed} are" if books.state.dismissed else None


@holds(32, OF_AN_OPEN_POOL)
def each_who_is_served_knows(books):
    """Every caller that got a connection has woken up and has it."""
    given = {x for x in books.open_pool.limiter.statistics().borrowers if x.slot}
    asleep = given - set(books.held)
    return f"{len(asleep)} sleep on" if asleep else None


@holds(33, OF_AN_OPEN_POOL)
def closing_ends_all_waiting(books):
    """Once the pool closes, no caller waits and no attempt is pending."""
    state = books.state
    if state.shut and (state.waiting or books.server.connecting):
        return f"{len(state.waiting)} wait, {books.server.connecting} are made"
    return None


@holds(34, OF_AN_OPEN_POOL)
def it_closes_in_time(books):
    """It closes once its leases are released or the grace is over, and only then."""
    if not books.state.shut:
        return "it should" if books.close_by is not None else None
    if books.close_by is None:
        return "nobody closed it"
    if not books.server.closing and (not books.held or books.now >= books.close_by):
        return f"at {books.now} it has not, and should have by {books.close_by}"
    return None


@holds(35, OF_AN_OPEN_POOL)
def an_outage_ends_with_its_cause(books):
    """No caller with a token waits long at a healthy server."""
    state = books.state
    # Earlier attempts, probes and closes that hang must end first.
    late = books.well_for > 20 and state.waiting and books.tokens > state.in_use
    room = sum(slot.streams for slot in usable(state))
    served = state.in_use >= room and state.room() <= 0
    return f"{len(state.waiting)} do" if late and not served else None


@holds(51, OF_AN_OPEN_POOL)
def an_outage_is_probed_rarely(books):
    """
    In an outage the server sees few probes a second: four, and one of each new
    connection.
    """
    since = max(books.declared_at, books.now - 1)
    recent = [at for at in books.server.refused_probes if at > since]
    new = sum(slot.opened_at > books.now - 1 for slot in books.state.open)
    is_late = books.state.outage.declared and books.declared_before
    return (
        f"it saw {len(recent)}" if is_late and len(recent) > 4 + max(1, new) else None
    )


@holds(52, OF_AN_OPEN_POOL)
def a_connection_that_answers_is_kept(books):
    """
    No refused connection that is otherwise healthy is closed as lost or unhealthy.
    """
    for slot in (*books.state.open, *books.state.closing):
        conn = slot.connection
        if conn is None or slot.retired not in {"lost", "unhealthy"}:
            continue
        if conn.refuses and not conn.was_unwell:
            return f"{conn} is"
    return None


# -- the pool, open or closed ---------------------------------------------------------


@holds(36, OF_THE_POOL)
def it_is_open_while_it_should_be(books):
    """
    The pool is open from its first use until it is closed, whatever happens to it.
    """
    is_open = books.open_pool is not None
    return f"it is {books.pool!r}" if is_open != books.should_be_open else None


@holds(37, OF_THE_POOL)
def closed_nothing_is_left(books):
    """A closed pool has no task, no timer, and no connection at the server."""
    if books.open_pool is not None:
        return None
    left = (books.pools_tasks(), books.timers(), len(books.server.open))
    if any(left) or books.server.connecting or books.server.closing:
        return f"tasks, timers, connections: {left}"
    return None


@holds(38, OF_THE_POOL)
def each_is_closed_at_most_once(books):
    """The pool closes each connection at most once."""
    twice = [conn for conn in books.server.connections if conn.closed > 1]
    return f"{twice} were closed again" if twice else None


@holds(39, OF_THE_POOL)
def attempts_are_bounded(books):
    """
    A server that refuses sees at most 20 attempts a second, however many callers ask.
    """
    recent = [at for at in books.server.refusals if at > books.now - 1]
    return f"it saw {len(recent)}" if len(recent) > 20 + RAMP else None


@holds(40, OF_THE_POOL)
def nobody_waits_for_too_long(books):
    """No caller waits after its timeout."""
    late = [x for x in books.callers if x.outcome is None and x.deadline <= books.now]
    return f"{late} do" if late else None


@holds(41, OF_THE_POOL)
def nobody_is_sent_away_without_cause(books):
    """A caller that got no connection got the reason, and the reason is true."""
    for caller in books.ended_now:
        match caller.outcome:
            case PoolTimeout():
                # A check leaves the queue once its answer would be late.
                true = caller.ended >= caller.deadline or caller.budget
            case PoolSaturated():
                # An estimate refuses a check only while calls are under way.
                true = books.pool.options.max_waiting is not None
                true = true or (caller.budget and caller.met_leases)
            case PoolClosed():
                true = caller.came_closed or books.closed_at >= caller.came_at
            case ConnectFailed():
                true = books.server.failures + books.server.given_up > 0
                true = true or bool(books.server.refused_probes)
            case PoolError() | BaseException():
                true = False
            case _:
                true = True
        if not true:
            return f"{caller} got {caller.outcome!r} at {caller.ended}"
    return None


@holds(42, OF_THE_POOL)
def cancelled_means_gone(books):
    """A cancelled caller no longer waits, and holds nothing."""
    there = [x for x in books.callers if x.cancelled and (x.waits or x.holds)]
    return f"{there} are there" if there else None


@holds(43, OF_THE_POOL)
def each_acquire_is_counted_once(books):
    """Each call of acquire() is counted under its outcome, or waits."""
    counters = books.pool._counters
    counted = {name: getattr(counters, name) for name in books.outcomes}
    return f"{counted}, not {books.outcomes}" if counted != books.outcomes else None


@holds(44, OF_THE_POOL)
def connections_are_counted_as_the_server_does(books):
    """
    Connections made and closed, and failed attempts, are counted as the server saw
    them.
    """
    counters, server = books.pool._counters, books.server
    closed = sum(conn.closed for conn in server.connections)
    ours = (counters.connects, sum(counters.closes.values()))
    theirs = (len(server.connections), closed)
    if ours != theirs or sum(counters.connect_failures.values()) < server.failures:
        return f"{ours}, and the server saw {theirs} and {server.failures} failures"
    return None


@holds(45, OF_THE_POOL)
def the_pool_tells_its_state(books):
    """
    status() and connections() show an open pool, and no connections once it is closed.
    """
    pool = books.pool
    if books.open_pool is not None:
        same = pool.status() == books.open_pool.status()
        return (
            None if same and len(pool.connections()) == len(books.state.open) else "no"
        )
    status = pool.status()
    return (
        "it is closed" if status.total or status.waiting or pool.connections() else None
    )


@holds(46, OF_THE_POOL)
def what_was_given_back_is_useless(books):
    """A released handle gives no access to a connection."""
    for conn in books.given_back[-3:]:
        try:
            conn.connection  # noqa: B018
        except PoolError:
            continue
        return f"{conn!r} does"
    return None
