"""
Any configuration gives a working pool or a clear error, never a hang or a half-open
pool.

In virtual time. `fuzzing` detects runs that wait forever, or work without a pause.
`--hypothesis-profile=deep` runs forty times as many examples.
"""

# ruff: noqa: PT017  (a value may be accepted or refused with an error)

from __future__ import annotations

import math
import re
import subprocess
import sys

import anyio
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionPool,
    Identity,
    IdentityType,
    PoolClosed,
    PoolTimeout,
    TopazConfig,
)
from fastapi_topaz.testing import FakeConnector
from kit.backends import backends
from kit.fuzzing import (
    CLEAR,
    OwnError,
    Raises,
    anything,
    assert_usable,
    examples,
    is_told,
    or_odd,
    run,
    texts,
)


pytestmark = pytest.mark.real_clock  # each example has its own loop

counts = st.integers(0, 5)
times = st.sampled_from([0, 0.5, 1, 60, 3e8, 10**300, math.inf]) | st.floats(0.25, 1e4)
TIMES = ["acquire_timeout", "connection_timeout", "max_idle_time", "max_lifetime"]
TIMES += ["idle_check_interval", "health_check_interval", "health_check_timeout"]
TIMES += ["leak_threshold"]
PARAMETERS = {
    **dict.fromkeys(["max_connections", "streams_per_connection"], counts),
    **dict.fromkeys(["min_connections", "max_retries"], counts),
    **dict.fromkeys(TIMES, times),
    **dict.fromkeys(["eager_init", "retry_on_failure"], st.booleans()),
    "semantic_conventions": st.booleans(),
    "max_waiting": st.none() | counts,
    "name": st.none() | texts,
}
NEVER_SHORT = {"idle_check_interval", "health_check_interval", "max_lifetime"}
NEVER_SHORT |= {"leak_threshold"}


def is_bearable(name, value):
    """Return whether a test has the time and memory for these parameters."""
    if not isinstance(value, int | float):
        return True
    if name == "min_connections":
        return value <= 5
    return name not in NEVER_SHORT or not 0 < value < 0.2


# -- parameters -----------------------------------------------------------------------


async def works(pool, connector):
    """Use a pool in every way, twice; nothing of it is left."""
    for _ in range(2):
        async with pool:
            most = range(pool.status().streams_max)[:3]
            leases = [await pool.acquire(timeout=9) for _ in most]
            await anyio.sleep(1)
            for conn in leases:
                await pool.release(conn)
            pool.resize(0, pool.options.max_connections)
            pool.drain()
            await anyio.sleep(5)
            await assert_usable(pool)
        assert pool._open_pool is None
        assert all(conn.closed == 1 for conn in connector.connections)


optional = {name: or_odd(usual) for name, usual in PARAMETERS.items()}


@backends
@examples(120)
@given(parameters=st.fixed_dictionaries({}, optional=optional))
def test_any_parameters_give_a_working_pool_or_an_error_that_names_one(
    backend, parameters
):
    assume(all(is_bearable(*item) for item in parameters.items()))
    connector = FakeConnector()
    try:
        pool = ConnectionPool(connector=connector, **parameters)
    except CLEAR as error:
        assert is_told(error, parameters)
        return
    # In zero time, no attempt can connect and no connection can answer a probe.
    assume(pool.options.connection_timeout > 0.01)
    assume(pool.options.health_check_timeout > 0.01)
    run(backend, works, pool, connector)


@pytest.mark.parametrize("name", [*PARAMETERS, "connector"])
@examples(25)
@given(value=anything)
def test_each_single_parameter_is_accepted_or_named_in_the_error(name, value):
    try:
        pool = ConnectionPool(**{name: value})
    except OwnError:
        assert isinstance(value, Raises)
    except CLEAR as error:
        assert is_told(error, {name: value})
    else:
        assert pool.status().total == 0


@pytest.mark.parametrize("name", ["min_connections", "max_connections", "max_waiting"])
def test_a_number_too_long_to_print_is_refused_with_its_parameter_name(name):
    with pytest.raises(ValueError, match=name):
        ConnectionPool(**{name: -(10**5000)})


# -- the other options ----------------------------------------------------------------


OPTIONS = {
    "url": st.sampled_from(["localhost:1", "dns:///x", "http://x"]) | texts,
    **dict.fromkeys(["tenant_id", "api_key", "cert_file_path"], st.none() | texts),
    "insecure": st.booleans(),
}
SECRET = {"tenant_id", "api_key"}


@examples(150)
@given(
    given=st.fixed_dictionaries({}, optional={k: or_odd(v) for k, v in OPTIONS.items()})
)
def test_any_authorizer_options_are_accepted_or_named_in_the_error(given):
    try:
        options = AuthorizerOptions(**given)
    except CLEAR as error:
        named = {name: v for name, v in given.items() if name in str(error)}
        assert named
        if not SECRET & named.keys():
            assert is_told(error, given)
    else:
        assert all(v.isascii() and v.isprintable() for _, v in options.metadata)
        pool = ConnectionPool()
        pool.configure(options)
        assert pool.authorizer_options == options


@examples(150)
@given(kind=or_odd(st.integers(0, 5)), value=or_odd(st.none() | texts))
def test_any_identity_is_accepted_or_refused_without_showing_its_value(kind, value):
    try:
        identity = Identity(kind, value)
    except CLEAR as error:
        assert re.match("type must|value must", str(error))
        if isinstance(value, str) and len(value) > 30:
            assert value not in str(error)
    else:
        assert identity.type in set(IdentityType)
        assert identity.value is None or isinstance(identity.value, str)


@pytest.mark.parametrize("transport", ["native", "grpcio"])
@pytest.mark.parametrize("url", ["dns:///"])
def test_a_target_that_cannot_be_parsed_is_refused_and_nothing_hangs(url, transport):
    # In a separate process: while it hangs, even its own timers do not fire.
    script = f"""
import anyio
from fastapi_topaz import AuthorizerOptions, ConnectionPool, PoolError
async def main():
    pool = ConnectionPool(connection_timeout=0.3, transport={transport!r})
    options = AuthorizerOptions(insecure=True)
    object.__setattr__(options, "url", {url!r})  # it would be refused otherwise
    try:
        pool.configure(options)
        await pool.acquire(timeout=1)
    except (PoolError, ValueError):
        await pool.close(0)
    else:
        raise SystemExit("connected")
anyio.run(main)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=5)


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
async def test_an_impossible_file_path_is_refused_with_its_parameter_name(path):
    pool = ConnectionPool()
    pool.configure(AuthorizerOptions(cert_file_path=path))
    with pytest.raises(ValueError, match="cert_file_path must be"):
        await pool.initialize()


def test_a_path_like_object_is_accepted_as_its_path():
    path = type("Path", (), {"__fspath__": lambda _self: "ca.pem"})()
    assert AuthorizerOptions(cert_file_path=path).cert_file_path == "ca.pem"


@pytest.mark.parametrize("meter", [None, 5])
def test_a_meter_provider_without_instruments_is_named_in_the_error(meter):
    provider = type("Provider", (), {"get_meter": lambda *_args: meter})()
    with pytest.raises(CLEAR, match="meter_provider"):
        ConnectionPool(meter_provider=provider)


SETTINGS = {
    "authorizer_options": st.just(AuthorizerOptions()),
    "policy_path_root": st.sampled_from(["myapp", "a.b", ".a", "a..b"]) | texts,
    "identity_provider": st.just(lambda _request: None),
    "policy_instance_name": st.none() | texts,
    "policy_instance_label": st.none() | texts,
    "resource_context_provider": st.none(),
    "connection_pool": st.none(),
    "check_timeout": times,
}


@examples(150)
@given(given=st.fixed_dictionaries({k: or_odd(v) for k, v in SETTINGS.items()}))
def test_any_configuration_is_accepted_or_its_error_names_the_fault(given):
    try:
        config = TopazConfig(**given)
    except OwnError:
        assert isinstance(given["authorizer_options"], Raises)
    except CLEAR as error:
        told = {**given, "authorizer_options": given["authorizer_options"]}
        unshown = type(given["authorizer_options"]).__name__ in str(error)
        assert is_told(error, told) or ("authorizer_options" in str(error) and unshown)
    else:
        assert config.connection_pool.status().total == 0


# -- arguments of a pool --------------------------------------------------------------

steps = st.one_of(
    st.tuples(st.just("acquire"), or_odd(times)),
    st.tuples(st.just("close"), or_odd(times)),
    st.tuples(st.just("release"), anything),
    st.tuples(st.just("resize"), st.tuples(or_odd(counts), or_odd(counts))),
)


@backends
@examples(60)
@given(steps=st.lists(steps, max_size=8))
def test_any_argument_leaves_the_pool_consistent(backend, steps):
    connector = FakeConnector()
    pool = ConnectionPool(connector=connector, max_connections=2)

    async def use():
        await pool.initialize()
        for name, value in steps:
            try:
                if name == "acquire":
                    await pool.release(await pool.acquire(timeout=value))
                elif name == "resize":
                    if is_bearable("min_connections", value[0]):
                        pool.resize(*value)
                else:
                    await getattr(pool, name)(value)
            except CLEAR as error:
                assert re.search(r"timeout|grace|_connections|release\(\)", str(error))
            except (PoolClosed, PoolTimeout):
                pass
        await pool.initialize()
        await assert_usable(pool)
        await pool.close()
        assert not connector.open

    run(backend, use)
