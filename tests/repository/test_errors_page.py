"""Test that the tables of errors and HTTP statuses match what a guard answers."""

from __future__ import annotations

import re

import anyio
import grpc
import pytest
from fastapi import HTTPException

import fastapi_topaz
from fastapi_topaz import ConnectionPool, TopazError, require_policy_allowed
from fastapi_topaz._app.guards import DENIED, MISUSE, UNAVAILABLE, WRONG_POLICY
from kit.backends import backends
from kit.configs import REQUEST, TOPAZ, config_of
from kit.pages import DOCS


pytestmark = pytest.mark.real_clock

PAGE = (DOCS / "errors.md").read_text()
CLASSES = re.findall(r"^\| `(\w+)` \| (\d{3}) \| (1|yes|no) \|", PAGE, re.MULTILINE)
STATUSES = re.findall(r"^\| `([A-Z_]+)` \| (\d{3}) \|", PAGE, re.MULTILINE)
BODIES = re.findall(r'^\| (\d{3}).* \| `\{"detail":"(.+)"\}` \|$', PAGE, re.MULTILINE)


def refusal(backend, options=TOPAZ, error=None):
    """Return the HTTPException of a guard. If *error* is given, its check ends so."""
    pool = ConnectionPool(min_connections=0)
    guard = require_policy_allowed(config_of(pool, options), "app.GET.documents")
    if error is not None:
        # The layers that the guard asks, in the cells of its function.
        cells = [cell.cell_contents for cell in guard.__wrapped__.__closure__]
        (rules,) = [cell for cell in cells if hasattr(cell, "ask")]

        async def ask(_question):
            raise error

        rules.ask = ask

    async def program():
        with pytest.raises(HTTPException) as caught:
            await guard(REQUEST)
        await pool.close()
        return caught.value

    return anyio.run(program, backend=backend)


@pytest.fixture
def authorizer(embedded_authorizer):
    embedded_authorizer.policies = lambda _check: False
    return embedded_authorizer


@backends
@pytest.mark.parametrize("name, status, after", CLASSES)
def test_an_exception_becomes_the_status_of_the_table(name, status, after, backend):
    error = getattr(fastapi_topaz, name)("a message")
    if after == "yes":
        error.retry_after = 7.0
    answer = refusal(backend, error=error)
    assert answer.status_code == int(status)
    waits = (answer.headers or {}).get("Retry-After")
    if after == "yes":
        assert 7 <= int(waits) <= 14
    else:
        assert waits == {"1": "1", "no": None}[after]


@backends
@pytest.mark.parametrize("name, status", STATUSES)
def test_a_grpc_status_becomes_the_status_of_the_table(
    name, status, backend, authorizer
):
    authorizer.fail(name, methods=["Is"])
    answer = refusal(backend, authorizer.options)
    assert answer.status_code == int(status)
    assert (str(answer.status_code), answer.detail) in BODIES


@backends
def test_a_denial_is_in_the_table(backend, authorizer):
    assert "| `OK`, the decision is false | 403 |" in PAGE
    answer = refusal(backend, authorizer.options)
    assert ("403", answer.detail) in BODIES


def test_every_exception_is_in_the_table():
    public = [getattr(fastapi_topaz, name) for name in fastapi_topaz.__all__]
    raised = {
        each.__name__
        for each in public
        if isinstance(each, type) and issubclass(each, TopazError)
    }
    assert {name for name, *_ in CLASSES} == raised - {"TopazError", "PoolError"}


def test_every_grpc_status_is_in_the_table():
    assert sorted([*(name for name, _ in STATUSES), "OK"]) == sorted(
        status.name for status in grpc.StatusCode
    )


def test_each_body_of_the_table_is_sent():
    assert sorted(BODIES) == sorted(
        (str(status), detail)
        for status, detail in (DENIED, UNAVAILABLE, MISUSE, WRONG_POLICY)
    )
