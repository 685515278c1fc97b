"""Odd values, and runs in virtual time that neither hang nor spin unnoticed."""

from __future__ import annotations

import enum
import functools
import logging
import math
import re
import types
from fractions import Fraction

import anyio
import trio
import trio.testing
from hypothesis import settings
from hypothesis import strategies as st

from fastapi_topaz import IdentityType
from kit.autojump import AutojumpLoop, AutojumpSelector


HOURS = 1_000_000.0
TURNS = 20_000
"""Of a loop whose clock stands still."""


def examples(count):
    # In proportion to what the profile says: 100 means *count*.
    return settings(max_examples=max(1, count * settings.default.max_examples // 100))


# -- a run in virtual time ----------------------------------------------------------


class SpinningError(AssertionError):
    """The loop runs and runs, and no time passes."""


class _Watch(trio.abc.Instrument):
    """Counts the turns of a loop while its clock stands still, and ends a run by it."""

    def __init__(self):
        self.now, self.turns, self.spins = -1.0, 0, False
        self.scope: anyio.CancelScope | None = None

    def look(self, now):
        self.turns = self.turns + 1 if now == self.now else 0
        self.now = now
        if self.turns > TURNS and self.scope is not None:
            self.spins = True
            self.scope.cancel()

    def before_io_wait(self, timeout):
        self.look(trio.current_time())


class _Selector(AutojumpSelector):
    watch: _Watch

    def select(self, timeout=None):
        self.watch.look(self.loop.now)
        return super().select(timeout)


def _loop(watch):
    made = AutojumpLoop()
    made._selector.__class__ = _Selector
    made._selector.watch = watch
    return made


def run(backend, function, *args):
    """Run it; fail if it hangs, spins, or leaves a task behind."""
    watch = _Watch()

    async def main():
        before = len(anyio.get_running_tasks())
        # There is always a next timer, so who waits for ever arrives here at once.
        with anyio.CancelScope() as watch.scope, anyio.fail_after(HOURS):
            await function(*args)
            await anyio.wait_all_tasks_blocked()
            assert len(anyio.get_running_tasks()) == before
        watch.scope = None

    if backend == "trio":
        clock = trio.testing.MockClock(autojump_threshold=0)
        options = {"clock": clock, "instruments": [watch]}
    else:
        options = {"loop_factory": functools.partial(_loop, watch)}
    # pytest keeps every line, and most of the time would go there. Bugs of the pool's
    # own tasks still show: they are CRITICAL.
    logging.disable(logging.ERROR)
    try:
        anyio.run(main, backend=backend, backend_options=options)
    finally:
        logging.disable(logging.NOTSET)
    if watch.spins:
        raise SpinningError


# -- odd values ---------------------------------------------------------------------


class OwnError(Exception):
    """What an object of the application raises is for the application to see."""


class Text(str):
    """As text is in many libraries: of a class of its own."""

    __slots__ = ()


class Index:
    def __index__(self):
        return 3

    __int__ = __index__


class Float(Index):
    def __float__(self):
        return 3.0


class Small(enum.IntEnum):
    THREE = 3


class Raises:
    """Whatever it is asked for, it raises."""

    def __getattr__(self, name):
        raise AttributeError(name) if name.startswith("__") else OwnError(name)


def looped(kind):
    """A container that holds itself."""
    value = kind()
    if kind is list:
        value.append(value)
    else:
        value["a"] = value
    return value


TEXTS = ["", " ", "x", "\0", "a\0b", "\ud800", "é", "x\n", "%s{0}", "a.", "x" * 9000]
HUGE = [2**31, 2**53 + 1, 2**63, 2**64, -(2**70), 10**400, -(10**400)]
FLOATS = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e300, 1.7e308, 5e-324]

texts = st.sampled_from(TEXTS) | st.text(max_size=8) | st.builds(Text, st.text())
numbers = st.integers(-3, 40) | st.sampled_from(HUGE + FLOATS) | st.floats()
scalars = st.one_of(
    numbers,
    texts,
    st.none(),
    st.booleans(),
    st.binary(max_size=4),
    st.sampled_from([1j, Fraction(1, 3), Small.THREE, int, IdentityType.SUB, ...]),
    st.sampled_from([Index, Float, object, Raises]).flatmap(st.builds),
)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(texts | st.integers(), inner, max_size=3),
        st.sets(st.integers(), max_size=2),
        inner.map(lambda value: iter([value])),
        inner.map(lambda value: types.MappingProxyType({"a": value})),
        st.sampled_from([list, dict]).map(looped),
    ),
    max_leaves=6,
)


def or_odd(usual):
    """*usual* three times of four, or one good argument would never meet another."""
    return st.one_of(usual, usual, usual, anything)


# -- errors and pools -----------------------------------------------------------------

CLEAR = (TypeError, ValueError)


def is_told(error, given):
    """The message names an argument of those that were *given*, and value or type."""
    message = str(error)
    return any(
        re.search(rf"\b{name}\b", message)
        # What has no end has no place in a message.
        and (
            repr(value) in message
            or f"{name} is too large" in message
            # A long text is cut, and of a container only the type is shown.
            or (isinstance(value, str) and repr(value)[:100] in message)
            or f"got a {type(value).__name__}" in message
        )
        for name, value in given.items()
    )


async def assert_usable(pool, most=30):
    """Nobody holds anything, and all can be had, up to a number that is bearable."""
    status = pool.status()
    assert (status.waiting, status.streams_in_use) == (0, 0)
    assert pool._open_pool.limiter.borrowed_tokens == 0
    leases = [await pool.acquire(timeout=9) for _ in range(status.streams_max)[:most]]
    for conn in leases:
        await pool.release(conn)
