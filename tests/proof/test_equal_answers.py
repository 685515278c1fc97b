"""Equal questions have equal answers over both transports, from a server on C-core."""

from __future__ import annotations

import os
import random
import zlib

import anyio
import grpc
import pytest
from aserto.authorizer.v2 import Decision, IsRequest, IsResponse

from fastapi_topaz import AuthorizerOptions, ConnectionPool, Identity, IdentityType
from kit.backends import asyncio_only
from kit.ccore import CCoreServer
from kit.sizes import at_night


pytestmark = [pytest.mark.real_clock, pytest.mark.timeout(3600)]

CALLERS = 20
CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]
TEXTS = [
    "",
    "a",
    "with spaces  and\ttabs\r\n",
    " at both ends ",
    "100 % of it, %41 and %zz",
    "Ünïcödé ☺ and 😈",
    "\x00\x01\x7f\x80",
    "x" * 2000,
]


def answer(method, request, context):
    """Answer as the bytes of the question say: the same for the same question."""
    if not method.endswith("/Is"):
        return b""  # a probe
    asked = IsRequest.FromString(request)
    told = asked.SerializeToString(deterministic=True)
    told += str(dict(context.invocation_metadata()).get("aserto-tenant-id")).encode()
    rng = random.Random(zlib.crc32(told))
    if rng.random() < 0.3:
        context.send_initial_metadata(metadata(rng))
        context.set_trailing_metadata(metadata(rng))
        context.abort(rng.choice(CODES), rng.choice(TEXTS))
    if rng.random() < 0.05:
        return rng.randbytes(rng.choice([1, 5, 2000]))
    names = [*asked.policy_context.decisions]
    if rng.random() < 0.05:
        names = names[1:]
    if rng.random() < 0.05:
        names += names
    decisions = [
        Decision(decision=name, **{"is": rng.random() < 0.5}) for name in names
    ]
    return IsResponse(decisions=decisions).SerializeToString()


def metadata(rng):
    pairs = [("x-a", "b"), ("x-a", ""), ("x-b-bin", rng.randbytes(7)), ("x-c.d", "e f")]
    return tuple(rng.sample(pairs, rng.randrange(len(pairs) + 1)))


def text(rng):
    return rng.choice([*TEXTS, str(rng.random())])


def context(rng, depth=0):
    """Return a random resource context."""
    kinds = 6 if depth < 3 else 4
    match rng.randrange(kinds):
        case 0:
            return text(rng)
        case 1:
            return rng.choice([0, -1, 2**53, 0.1, -1e300])
        case 2:
            return rng.choice([True, False, None])
        case 3:
            return text(rng)
        case 4:
            return [context(rng, depth + 1) for _ in range(rng.randrange(4))]
        case _:
            return {text(rng): context(rng, depth + 1) for _ in range(rng.randrange(4))}


def question(rng):
    kind = rng.choice([IdentityType.NONE, IdentityType.SUB, IdentityType.JWT])
    identity = Identity(kind, "" if kind is IdentityType.NONE else f"u{rng.random()}")
    names = rng.sample(["allowed", "visible", "enabled", "x_1"], rng.randrange(1, 5))
    return {
        "policy_path": rng.choice(["app.get", "app.post.x", "a"]),
        "decisions": names,
        "identity": rng.choice([None, identity]),
        "resource_context": rng.choice(
            [None, {text(rng): context(rng) for _ in range(rng.randrange(4))}]
        ),
        "policy_instance_name": rng.choice([None, "instance"]),
        "policy_instance_label": rng.choice([None, "label"]),
    }


def known(pairs):
    """Return metadata without what the two servers' libraries add themselves."""
    return sorted((key, value) for key, value in pairs if key.startswith("x-"))


async def outcome(pool, asked):
    """Return the answer to a question, or all that its error says."""
    try:
        async with pool.acquire() as conn:
            return await conn.decisions(**asked, timeout=60)
    except grpc.aio.AioRpcError as error:
        return (
            error.code(),
            error.details(),
            known(error.initial_metadata()),
            known(error.trailing_metadata()),
        )


SIZES = [800, pytest.param(at_night(100_000), marks=pytest.mark.nightly)]


@asyncio_only
@pytest.mark.parametrize("count", SIZES)
async def test_both_transports_give_equal_answers(count):
    seed = 1 if count == SIZES[0] else int.from_bytes(os.urandom(4))
    print(f"seed {seed}")  # noqa: T201
    kinds = {dict: 0, tuple: 0}
    codes = set()
    left = count

    with CCoreServer(answer) as server:
        options = AuthorizerOptions(url=server.url, insecure=True, tenant_id="tenant")

        def pool_over(transport):
            pool = ConnectionPool(
                transport=transport,
                min_connections=0,
                max_connections=4,
                acquire_timeout=60,
            )
            pool.configure(options)
            return pool

        async def caller(number):
            nonlocal left
            rng = random.Random(seed * CALLERS + number)
            while left > 0:
                left -= 1
                asked = question(rng)
                one = await outcome(native, asked)
                other = await outcome(grpcio, asked)
                assert one == other, asked
                kinds[type(one)] += 1
                if isinstance(one, tuple):
                    codes.add(one[0])

        async with (
            pool_over("native") as native,
            pool_over("grpcio") as grpcio,
            anyio.create_task_group() as tasks,
        ):
            for number in range(CALLERS):
                tasks.start_soon(caller, number)
    assert sum(kinds.values()) == count
    assert min(kinds.values()) > count // 10
    assert codes == set(CODES)
