"""A slot, and a connection that cannot tell whether it is lost."""

from __future__ import annotations

from fastapi_topaz._pool.state.slot import Slot
from kit.states import make_state, open_one, taken


class Silent:
    """A connection without the attribute: looking for it raises."""

    @property
    def is_lost(self):
        raise ZeroDivisionError


class Confused:
    def is_lost(self):
        raise ZeroDivisionError


def test_a_connection_whose_is_lost_cannot_be_had_is_never_asked():
    slot = Slot()
    slot.watch(Silent())
    assert slot.is_lost is None
    assert not slot.is_gone()
    assert slot.last_error is None


def test_a_connection_that_fails_to_tell_is_not_gone_and_not_asked_again():
    slot = Slot()
    slot.watch(Confused())
    assert not slot.is_gone()
    assert slot.is_lost is None
    assert slot.last_error == "is_lost() raised ZeroDivisionError"


def test_a_connection_that_fails_to_tell_is_leased_all_the_same():
    state = make_state()
    slot = open_one(state, connection=Confused())
    assert taken(state).slot is slot
    assert not state.to_probe
