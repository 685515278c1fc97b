"""
Any connector gives leases or a clear error. The pool never hangs and never fails
itself.

In virtual time. `--hypothesis-profile=deep` runs forty times as many examples.
"""

from __future__ import annotations

import contextlib
import logging

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_topaz import ConnectFailed, ConnectionPool, PoolClosed, PoolError
from kit.backends import backends
from kit.channels import INFO
from kit.fuzzing import CLEAR, OwnError, anything, examples, run


pytestmark = pytest.mark.real_clock  # each example has its own loop


@contextlib.contextmanager
def bugs_logged():
    """Collect the log records of failed tasks of the pool itself."""
    handler, found = logging.Handler(logging.CRITICAL), []
    handler.emit = found.append
    logger = logging.getLogger("fastapi_topaz")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def raising(error):
    def method(*_args, **_kwargs):
        raise error

    return method


def giving(value):
    return lambda *_args, **_kwargs: value


def eventually(value):
    async def method(*_args, **_kwargs):
        await anyio.lowlevel.checkpoint()
        return value

    return method


def later(error):
    async def method(*_args, **_kwargs):
        await anyio.lowlevel.checkpoint()
        raise error

    return method


async def never(*_args, **_kwargs):
    await anyio.sleep_forever()


errors = st.sampled_from([OwnError("own"), ValueError(), KeyError(1), TimeoutError()])
errors |= st.just(ConnectFailed("own", reason="tls"))
behaviours = st.one_of(
    errors.map(raising),
    errors.map(later),
    anything.map(giving),
    anything.map(eventually),
    st.just(never),
    anything,
    errors.map(lambda error: property(raising(error))),
)
# Attributes that are read, but never called.
facts = anything | errors.map(lambda error: property(raising(error)))


def kind_of(required, told):
    """
    Classes with the methods *required*, odd or not, and some attributes of *told*.
    """
    sound = {name: st.just(eventually(None)) for name in required}
    return st.fixed_dictionaries(
        {name: usual | behaviours for name, usual in sound.items()}, optional=told
    ).map(lambda attributes: type("Odd", (), attributes))


connections = kind_of(
    ["probe", "close", "call"],
    {
        **dict.fromkeys(["judge", "is_lost", "refresh_liveness"], behaviours),
        "peer": facts,
    },
)
connectors = st.fixed_dictionaries(
    {"connection": connections, "connect": st.none() | st.none() | behaviours},
    optional={"target": facts, "spreads": facts, "validate": behaviours},
)


@backends
@examples(60)
@given(attributes=connectors)
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_any_connector_gives_leases_or_a_clear_error(backend, attributes):
    made, connect = attributes.pop("connection"), attributes.pop("connect")

    async def one(_self, _timeout):
        return made()

    connector = type("Odd", (), {**attributes, "connect": connect or one})()
    known = (*CLEAR, PoolError, OwnError, KeyError, TimeoutError)

    async def use():
        try:
            pool = ConnectionPool(connector=connector, health_check_interval=1)
        except known:
            return
        for _ in range(2):
            try:
                await pool.initialize()
                async with pool.acquire(timeout=5) as conn:
                    with anyio.move_on_after(5):
                        await conn.call(INFO, b"")
            except known:
                pass
            await anyio.sleep(5)
            await pool.close(0)
            assert pool._open_pool is None
            assert pool.status().total == 0

    with bugs_logged() as bugs:
        run(backend, use)
    assert bugs == []


class Unprinted:
    def __str__(self):
        raise OwnError("no text")


class Bare(ConnectFailed):
    """Like a subclass that does not call the constructor of its base."""

    def __init__(self):
        pass


def unlucky(error):
    return type("Unlucky", (), {"connect": later(error)})()


def nameless():
    return type(
        "Nameless", (), {"connect": later(KeyError(1)), "target": Unprinted()}
    )()


def undecided():
    attributes = {"probe": eventually(None), "close": eventually(None)}
    truth = type("Truth", (), {"__bool__": raising(OwnError("neither"))})()
    made = type("Made", (), {**attributes, "is_lost": giving(truth)})()
    return type("Undecided", (), {"connect": eventually(made)})()


@backends
@pytest.mark.parametrize(
    "connector",
    [
        unlucky(ConnectFailed("odd", reason=["unhashable"])),
        unlucky(Bare()),
        nameless(),
        undecided(),
    ],
    ids=["reason", "no reason", "target", "is_lost"],
)
def test_no_connector_makes_the_pool_itself_fail(backend, connector):
    async def use():
        async with ConnectionPool(connector=connector) as pool:
            try:
                async with pool.acquire(timeout=5):
                    pass
            except (*CLEAR, PoolError, OwnError) as error:
                assert not isinstance(error, PoolClosed)  # noqa: PT017

    with bugs_logged() as bugs:
        run(backend, use)
    assert bugs == []
