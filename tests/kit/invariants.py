"""
A numbered list of what holds in a pool after every step, whatever happened before.

Two machines do anything in any order, and check all invariants after each step. One
uses the bare state (`test_model_state`), one a real pool (`test_model_pool`). Each
keeps its own books of which callers came, wait and hold leases. It never asks the pool
for anything that it can know itself. A check gets these books; the state is
`books.state`.

Invariants that need a real pool continue in `invariants_pool`. Run this file to print
the whole list.
"""

from __future__ import annotations

import itertools
import math

import attrs

from fastapi_topaz._pool.state.outage import OVERDUE, PAUSE
from fastapi_topaz._pool.state.pool_state import RAMP
from fastapi_topaz._pool.state.snapshot import connection_statuses


EVERYWHERE = []
"""Invariants that both machines check, as long as the pool is open."""

OF_THE_STATE = []
"""Invariants that only the machine of the bare state can check."""


class Broken(AssertionError):  # noqa: N818  (named after the state of an invariant)
    """Some invariants do not hold; `names` has their names."""

    def __init__(self, found):
        super().__init__("\n".join(f"{held} BUT {detail}" for held, detail in found))
        self.names = {held.name for held, _ in found}


@attrs.frozen
class Invariant:
    """One invariant; `check` returns None, or a text that says what is wrong."""

    number: int
    check: object

    @property
    def name(self):
        return self.check.__name__

    def __str__(self):
        return f"{self.number}. {' '.join(self.check.__doc__.split())}"


def check(books, *lists):
    """Check all of *lists*, and raise `Broken` with the invariants that do not hold."""
    found = []
    for held in itertools.chain(*lists):
        detail = held.check(books)
        if detail:
            found.append((held, detail))
    if found:
        raise Broken(found)


def holds(number, where):
    """Add the decorated check to the list *where*."""

    def add(check):
        where.append(Invariant(number, check))
        return check

    return add


def usable(state):
    return [slot for slot in state.open if slot.retired is None]


def came(books, leases):
    return [books.came.get(claim, math.inf) for claim in leases]


# -- connections: each is in one place, and there are never too many ------------------


@holds(1, EVERYWHERE)
def each_connection_is_in_one_place(books):
    """A connection is either being made, open, or being closed."""
    state = books.state
    places = [*state.connecting, *state.open, *state.closing]
    if len(places) != len(set(places)):
        return f"one is in two places: {places}"
    return None


@holds(2, EVERYWHERE)
def there_are_never_too_many(books):
    """All connections together are at most the maximum, except after it was lowered."""
    state, most = books.state, books.state.options.max_connections
    number = len(state.connecting) + len(state.open) + len(state.closing)
    if number > max(most, books.number_before):
        return f"there are {number} with a maximum of {most}"
    return None


@holds(3, EVERYWHERE)
def what_is_too_much_is_on_its_way_out(books):
    """At most the maximum may be leased, and none at all once the pool closes."""
    state = books.state
    most = 0 if state.shut else state.options.max_connections
    if len(usable(state)) > most:
        return f"{len(usable(state))} may be leased, and {most} is the most"
    return None


@holds(4, EVERYWHERE)
def none_is_closed_under_a_lease(books):
    """A connection that carries a lease is not closed before the grace is over."""
    if books.grace_is_over:
        return None
    closed = [x for x in books.held if x.slot not in books.state.open]
    return f"{closed} are held on closed ones" if closed else None


@holds(5, EVERYWHERE)
def one_that_is_to_go_goes_when_it_is_idle(books):
    """
    An open connection that may no longer be leased carries a lease, or would be closed.
    """
    late = [x for x in books.state.open if x.retired is not None and not x.leases]
    return f"{late} have no reason to stay" if late else None


@holds(6, EVERYWHERE)
def only_idle_ones_are_reaped(books):
    """A connection that is retired because it is idle carries no lease."""
    state = books.state
    reaped = [x for x in (*state.open, *state.closing) if x.retired == "idle"]
    return "it carries leases" if any(x.leases for x in reaped) else None


@holds(7, EVERYWHERE)
def what_is_closed_is_forgotten(books):
    """No data is kept about connections that are gone."""
    state = books.state
    kept = {*state.ready, *state.rotation._expired}
    return "it remembers others" if kept - state.open.keys() else None


@holds(8, EVERYWHERE)
def no_time_is_of_the_future(books):
    """
    No connection was opened, used or proven after now, nor used before it was opened.
    """
    for slot in books.state.open:
        times = (slot.opened_at, slot.last_used_at, slot.proven_at)
        if max(times) > books.now or min(times) < slot.opened_at:
            return f"at {books.now}: {slot}"
    return None


# -- leases: each is counted once -----------------------------------------------------


@holds(9, EVERYWHERE)
def leases_are_counted_once(books):
    """The number of streams in use equals the number of callers that hold one."""
    counted, held = books.state.in_use, len(books.held)
    return f"{counted} are counted and {held} are held" if counted != held else None


@holds(10, EVERYWHERE)
def each_connection_counts_its_leases(books):
    """A connection carries exactly the leases that are held on it."""
    state, on = books.state, [claim.slot for claim in books.held]
    for slot in (*state.connecting, *state.open, *state.closing):
        if slot.leases != on.count(slot):
            return f"{slot} carries {on.count(slot)}"
    return None


@holds(11, EVERYWHERE)
def no_connection_carries_too_many(books):
    """No connection carries more leases than it has streams."""
    full = [x for x in books.state.open if not 0 <= x.leases <= x.streams]
    return f"{full} do" if full else None


@holds(12, EVERYWHERE)
def nobody_waits_and_holds(books):
    """
    A waiting caller has no connection. A caller with a lease has one and does not wait.
    """
    state = books.state
    if any(claim.slot is not None for claim in state.waiting):
        return "somebody who waits has one"
    if any(claim.slot is None or claim in state.waiting for claim in books.held):
        return "somebody who holds has none"
    return None


@holds(13, EVERYWHERE)
def what_may_be_leased_is_ready(books):
    """Exactly the healthy connections that stay and have a free stream are ready."""
    state = books.state
    may_be = {x for x in usable(state) if not x.suspect and x.leases < x.streams}
    if state.ready.keys() != may_be:
        return f"ready are {[*state.ready]}, and it should be {may_be}"
    return None


@holds(14, EVERYWHERE)
def no_unfit_one_is_leased(books):
    """No caller gets a connection that is known to be lost, or is to be closed."""
    unfit = books.unfit.intersection(claim.slot for claim in books.served_now)
    return f"{unfit} was leased" if unfit else None


# -- waiting: in order, and never without a reason ------------------------------------


@holds(15, EVERYWHERE)
def the_queue_is_those_who_wait(books):
    """Exactly the callers wait that came and were neither served nor left, in order."""
    queue = list(books.state.waiting)
    if queue != books.queue or came(books, queue) != sorted(came(books, queue)):
        return f"{len(queue)} are in the queue, and {len(books.queue)} wait"
    return None


@holds(16, EVERYWHERE)
def nobody_is_overtaken(books):
    """Every served caller came before every caller that still waits."""
    last = max(came(books, books.served_now), default=-1)
    first = min(came(books, books.queue), default=last)
    if last > first:
        return f"number {last} was served, and number {first} waits"
    return None


@holds(17, EVERYWHERE)
def tokens_are_lent_to_those_in_front(books):
    """Each lease has a token, and so has each waiting caller while tokens are left."""
    state = books.state
    wanted = state.in_use + len(state.waiting)
    least = min(state.options.capacity, wanted)
    if not max(least, state.in_use) <= books.tokens <= wanted:
        return f"{books.tokens} are out, with {state.in_use} of {wanted} served"
    return None


@holds(18, EVERYWHERE)
def no_more_tokens_than_capacity(books):
    """No more tokens are used than there is capacity, except after it was lowered."""
    capacity = books.state.options.capacity
    if books.tokens > max(capacity, books.tokens_before):
        return f"{books.tokens} are out, with a capacity of {capacity}"
    return None


@holds(19, EVERYWHERE)
def nobody_who_may_be_served_waits(books):
    """While a caller with a token waits, no connection is ready."""
    state = books.state
    if state.waiting and books.tokens > state.in_use and state.ready:
        return f"{[*state.ready]} are, and {len(state.waiting)} wait"
    return None


@holds(20, EVERYWHERE)
def nobody_waits_for_nothing(books):
    """
    A waiting caller waits for an event that will come. This is the release of a lease,
    or a connection that is being made, retried, probed, or closed to make room.
    """
    state = books.state
    if not state.waiting or books.tokens <= state.in_use:
        return None
    probed = any(x.suspect and x.retired is None for x in state.open)
    if state.room() <= 0:
        coming = state.connecting or state.closing or probed or state.in_use
    else:
        coming = any(not slot.overdue for slot in state.connecting)
        coming = coming or state.next_attempt() > books.now
        # No task has handled it yet; another invariant says that a task will.
        coming = coming or not books.at_rest
    return None if coming else f"{len(state.waiting)} do"


@holds(21, EVERYWHERE)
def what_is_missing_is_being_made(books):
    """At rest, no attempt that is allowed now is left to be made."""
    missing = books.state.shortfall(books.tokens, books.now)
    return f"{missing} are" if books.at_rest and missing else None


@holds(22, EVERYWHERE)
def the_minimum_is_kept(books):
    """A pool in use has its minimum, unless the server or the maximum prevents it."""
    state, least = books.state, books.state.options.min_connections
    excused = (
        not (books.at_rest and state.keeps_minimum)
        or state.shut
        or state.connecting
        or state.attempts.failures
        or state.outage.is_silent
        or state.room() <= 0
        or books.now < state.next_attempt()
    )
    if not excused and len(usable(state)) < least:
        return f"it has {len(usable(state))} of {least}"
    return None


@holds(23, EVERYWHERE)
def a_suspect_is_probed(books):
    """A connection that may not be leased is closing, or a probe decides about it."""
    state = books.state
    for slot in usable(state):
        asked = slot.probing or (slot in state.to_probe and not books.at_rest)
        asked = asked or slot in state.outage.refused
        if slot.suspect and not asked:
            return f"nobody asks {slot}"
    return None


@holds(24, EVERYWHERE)
def an_outage_has_a_cause(books):
    """While the attempts to connect fail, there is an error to report."""
    attempts = books.state.attempts
    # Not the reverse: an attempt that began before a success may fail after it.
    return "not so" if attempts.failures and attempts.error is None else None


@holds(25, EVERYWHERE)
def the_status_adds_up(books):
    """The snapshot agrees with the books, and its numbers add up."""
    state, status = books.state, books.state.status()
    told = [x.condition for x in connection_statuses(state.open, books.now)]
    well = told.count("idle") + told.count("busy")
    failing = bool(state.attempts.failures or state.outage.declared)
    expected = {
        "total": len(told),
        "busy": len({claim.slot for claim in books.held} & state.open.keys()),
        "suspect": told.count("suspect"),
        "leaving": told.count("leaving"),
        "healthy_connections": well,
        "waiting": len(books.queue),
        "streams_in_use": len(books.held),
        "connecting": len(state.connecting),
        "failing": failing,
        "healthy": well > 0 or not failing,
    }
    wrong = {x: y for x, y in expected.items() if getattr(status, x) != y}
    if wrong or status.total != status.idle + status.busy:
        return f"{status!r} should have {wrong}"
    return None


# -- refusals: they close nothing, and a probe follows ---------------------------------


@holds(47, EVERYWHERE)
def a_refused_one_waits_for_its_probe(books):
    """A refused connection is open and stays, gets no lease, and is probed in time."""
    state, outage = books.state, books.state.outage
    for slot in outage.refused:
        if slot not in usable(state) or not slot.suspect or slot in state.ready:
            return f"{slot} does not"
        late = slot.probe_at > books.now + 2 * PAUSE * len(state.open)
        if late and not slot.probing:
            return f"{slot} waits until {slot.probe_at}, and it is {books.now}"
    # Also if the clock is set back.
    if outage.refused and outage.next_at(books.now) > books.now + OVERDUE:
        return "no probe is due soon"
    return None


@holds(48, EVERYWHERE)
def an_outage_is_one_of_all(books):
    """An outage begins only if each connection was refused, and it has an error."""
    outage = books.state.outage
    begins = outage.declared and not books.declared_before
    if begins and not outage.is_total(usable(books.state)):
        return f"{outage.refused} are refused, of {usable(books.state)}"
    return "it has no error" if outage.declared and outage.error is None else None


# -- only the state -------------------------------------------------------------------


@holds(26, OF_THE_STATE)
def each_is_handed_over_once(books):
    """Each connection to be closed is handed over exactly once."""
    listed = books.state.to_close + books.being_closed
    if len(listed) != len(set(listed)) or set(listed) != books.state.closing:
        return f"{listed} are, and {books.state.closing} should be"
    return None


@holds(49, OF_THE_STATE)
def only_what_never_answered_fails(books):
    """A connection that ends after it answered is not a failure of the server."""
    answered = books.answered_before.intersection(books.unanswered_now)
    return f"{answered} did" if answered else None


@holds(50, OF_THE_STATE)
def none_is_closed_for_a_refusal(books):
    """
    A refused connection stays, unless it is lost or is retired for another reason.
    """
    closed = [x for x in books.refused_now if x.retired in {"lost", "unhealthy"}]
    closed = [x for x in closed if not x.connection.lost]
    return f"{closed} do not" if closed else None


@holds(27, OF_THE_STATE)
def attempts_are_ramped(books):
    """In an outage one attempt is made at a time, else as many as are useful."""
    for coming, cautious, there in books.begun_now:
        if coming >= (1 if cautious else max(RAMP, there)):
            return f"one was begun with {coming} under way and {there} usable"
    return None


# -- turns ----------------------------------------------------------------------------


@holds(53, OF_THE_STATE)
def connections_take_turns(books):
    """
    Of the two ready connections whose turn is next, the one with fewer leases serves.
    One that rests has no turn.
    """
    for chosen, ready in books.chosen_now:
        turns = sorted(
            (
                (books.turns[slot], leases, slot)
                for slot, leases in ready.items()
                if not slot.rests and (slot is chosen or slot in books.state.ready)
            ),
            key=lambda turn: turn[0],
        )
        times = [time for time, _, _ in turns[:3]]
        if not turns or len(set(times)) < len(times):
            continue  # all rest, or some became ready together
        _, _, slot = min(turns[:2], key=lambda turn: turn[1])
        if slot is not chosen:
            return f"{chosen} serves, and it is the turn of {slot}"
    return None


@holds(54, OF_THE_STATE)
def what_was_needed_stays(books):
    """The search for idle connections leaves enough streams for the last peak."""
    for before, left, _, peak in books.reaped_now:
        if sum(left.values()) < min(sum(before.values()), peak):
            return f"{left} are left of {before}, and {peak} were needed"
    return None


@holds(55, OF_THE_STATE)
def what_is_not_needed_goes(books):
    """
    The search closes each idle connection above the minimum that was not needed.
    """
    least = books.state.options.min_connections
    for _, left, well, peak in books.reaped_now:
        streams = sum(well.values())
        idle = [
            slot
            for slot in well
            if not slot.leases
            and slot.opened_at <= books.idle_since
            and streams - slot.streams >= peak
        ]
        if idle and len(left) > least:
            return f"{idle} stay, and {peak} were needed"
    return None


@holds(56, OF_THE_STATE)
def what_is_needed_does_not_rest(books):
    """After the search at most one connection rests, and the others are enough."""
    for _, _, well, peak in books.reaped_now:
        resting = [slot for slot in well if slot.rests]
        streams = sum(well.values()) - sum(slot.streams for slot in resting)
        if len(resting) > 1 or (resting and streams < peak):
            return f"{resting} rest, and {peak} were needed"
    return None


if __name__ == "__main__":
    from kit.invariants_pool import OF_AN_OPEN_POOL, OF_THE_POOL

    for found in (*EVERYWHERE, *OF_THE_STATE, *OF_AN_OPEN_POOL, *OF_THE_POOL):
        print(found)  # noqa: T201
