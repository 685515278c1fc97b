"""Calls over real sockets while the network or a server fails."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc

import anyio
import anyio.lowlevel
import grpc
import grpc.aio._utils
import pytest
from starlette.requests import Request

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionLost,
    ConnectionPool,
    PoolError,
)
from fastapi_topaz._pool.state.backoff import FLOOR
from kit import waiting
from kit.configs import config_of


PATH = "myapp.GET.documents"


ASK = {"policy_path": PATH}


# Seconds that anything may take on a machine in trouble.
PATIENCE = 20
HOURS = 10_000.0

sockets = pytest.mark.real_clock


soon = functools.partial(waiting.eventually, timeout=PATIENCE)


class Gate:
    """A policy that holds callers until it is opened, and then allows."""

    def __init__(self):
        self.is_open = False
        self.held = 0

    async def __call__(self, _check):
        self.held += 1
        try:
            # Another thread opens it, even from a loop that is not asyncio's.
            while not self.is_open:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        finally:
            self.held -= 1
        return True


def via(proxy, ca=None):
    return AuthorizerOptions(url=proxy.url, cert_file_path=ca, insecure=ca is None)


def pool_to(options, **parameters):
    pool = ConnectionPool(**{"min_connections": 0, **parameters})
    pool.configure(options)
    return pool


def patient_config(pool, options=None, **settings):
    """Return a configuration that gives checks all the time that they need."""
    return config_of(pool, options, **{"check_timeout": PATIENCE, **settings})


def a_request():
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    return Request({**scope, "path_params": {}})


async def checked(config):
    return await config.is_allowed(a_request(), PATH)


class Outcomes(list):
    """The outcomes of calls, without cancelled ones: no other call may be missing."""

    async def of(self, function, *args, **kwargs):
        try:
            self.append(await function(*args, **kwargs))
        except Exception as error:  # noqa: BLE001  (checked by the test)
            self.append(error)

    @property
    def errors(self):
        return [outcome for outcome in self if isinstance(outcome, Exception)]


def is_a_lost_connection(error):
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code() is grpc.StatusCode.UNAVAILABLE
    return isinstance(error, ConnectionLost)


async def served(pool):
    """Send checks until one is answered; return its connection."""
    with anyio.fail_after(PATIENCE):
        while True:
            try:
                async with pool.acquire() as conn:
                    assert await conn.decisions(**ASK) == {"allowed": True}
                    return conn.connection
            except (PoolError, grpc.aio.AioRpcError):
                await anyio.sleep(0.01)


@contextlib.contextmanager
def paced(pool):
    """
    Check that no more attempts fail than fit in the time; a slow machine makes fewer.
    """
    failures = pool._counters.connect_failures
    began, before = anyio.current_time(), sum(failures.values())
    yield
    took = anyio.current_time() - began
    # The first two are made at once.
    assert sum(failures.values()) - before <= 3 + took / FLOOR


def forget_errors(caplog):
    """Drop the errors in the log: one may keep the socket of its attempt open."""
    caplog.clear()
    gc.collect()
