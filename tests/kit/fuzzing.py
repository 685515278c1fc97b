"""Odd values, and runs in virtual time that detect hangs and busy loops."""

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
"""The number of iterations of a loop while its clock stands still."""


def examples(count, by_default=1.0):
    """
    Return settings with *count* examples in proportion to the profile: 100 means all.

    The default profile has only the share *by_default* of them.
    """
    most = settings.default.max_examples
    share = 1 if most > 100 else by_default
    return settings(max_examples=max(1, int(share * count * most) // 100))


# -- a run in virtual time ----------------------------------------------------------


class SpinningError(AssertionError):
    """The loop runs without an end, and no time passes."""


class _Watch(trio.abc.Instrument):
    """Counts loop iterations while the clock stands still, and can end the run."""

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
    """Run it; fail if it hangs, runs in a busy loop, or leaves a task behind."""
    watch = _Watch()

    async def main():
        before = len(anyio.get_running_tasks())
        # There is always a next timer, so a run that hangs gets here at once.
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
    # pytest keeps every line, which would take most of the time. Bugs of the pool's own
    # tasks still show: they are CRITICAL.
    logging.disable(logging.ERROR)
    try:
        anyio.run(main, backend=backend, backend_options=options)
    finally:
        logging.disable(logging.NOTSET)
    if watch.spins:
        raise SpinningError


# -- odd values ---------------------------------------------------------------------


class OwnError(Exception):
    """An error of an application's object, which the application must see."""


class Text(str):
    """A text of a subclass of str, as many libraries have."""

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
    """An object that raises on every access."""

    def __getattr__(self, name):
        raise AttributeError(name) if name.startswith("__") else OwnError(name)


def looped(kind):
    """A container that contains itself."""
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
    """*usual* three times of four, or a valid argument would rarely meet another."""
    return st.one_of(usual, usual, usual, anything)


# -- errors and pools -----------------------------------------------------------------

CLEAR = (TypeError, ValueError)


def is_told(error, given):
    """Check that the message names an argument of *given*, and its value or type."""
    message = str(error)
    return any(
        re.search(rf"\b{name}\b", message)
        # An endless value must not be in a message.
        and (
            repr(value) in message
            or f"{name} is too large" in message
            # A long text is cut. For a container only its type is shown.
            or (isinstance(value, str) and repr(value)[:100] in message)
            or f"got a {type(value).__name__}" in message
        )
        for name, value in given.items()
    )


async def assert_usable(pool, most=30):
    """No caller holds a lease, and the full capacity is available, up to a limit."""
    status = pool.status()
    assert (status.waiting, status.streams_in_use) == (0, 0)
    assert pool._open_pool.limiter.borrowed_tokens == 0
    leases = [await pool.acquire(timeout=9) for _ in range(status.streams_max)[:most]]
    for conn in leases:
        await pool.release(conn)
