"""Test slots, and connections whose `is_lost` fails."""

from __future__ import annotations

from fastapi_topaz._pool.state.slot import Slot
from kit.states import make_state, open_one, taken


class Silent:
    """A connection without the attribute: reading `is_lost` raises."""

    @property
    def is_lost(self):
        raise ZeroDivisionError


class Confused:
    def is_lost(self):
        raise ZeroDivisionError


def test_a_connection_with_an_unreadable_is_lost_is_never_asked():
    slot = Slot()
    slot.watch(Silent())
    assert slot.is_lost is None
    assert not slot.is_gone()
    assert slot.last_error is None


def test_a_connection_with_a_raising_is_lost_is_kept_and_asked_once():
    slot = Slot()
    slot.watch(Confused())
    assert not slot.is_gone()
    assert slot.is_lost is None
    assert slot.last_error == "is_lost() raised ZeroDivisionError"


def test_a_connection_with_a_raising_is_lost_is_still_leased():
    state = make_state()
    slot = open_one(state, connection=Confused())
    assert taken(state).slot is slot
    assert slot.last_error == "is_lost() raised ZeroDivisionError"
    assert not state.to_probe


def test_a_raising_max_streams_leaves_the_streams_of_the_pool():
    class Odd:
        @property
        def max_streams(self):
            raise ZeroDivisionError

    state = make_state(streams_per_connection=4)
    slot = open_one(state, connection=Odd())
    assert slot.streams == 4
    assert slot.last_error == "max_streams raised ZeroDivisionError"
