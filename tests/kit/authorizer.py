"""Helpers for tests of calls to an authorizer."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest

from fastapi_topaz import Identity, IdentityType


ALICE = Identity(IdentityType.SUB, "alice@example.com")


# The value of a secret in these tests; no error may hold it.
SECRET = "s3cret"


async def status_raised(awaitable):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return caught.value.code()


# The probe that a new connection must answer before it is used.
FIRST_PROBE = {"Info": 1}
