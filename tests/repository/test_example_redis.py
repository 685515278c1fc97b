"""Test the example with Redis: two processes, and a redis-server that is killed."""

from __future__ import annotations

import contextlib
import importlib.util
import os

import httpx
import pytest

from kit.examples import EXAMPLES, environment, program, started
from kit.redis import VARIABLE, Redis
from kit.waiting import until


pytestmark = [
    pytest.mark.real_clock,
    pytest.mark.slow,
    pytest.mark.skipif(
        VARIABLE not in os.environ,
        reason=f"{VARIABLE} does not name the binary: `nox -s redis`",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("coredis") is None,
        reason="coredis is not installed: `nox -s redis`",
    ),
]

COMMANDS = {
    "asyncio": ("uvicorn redis_bus:app", "--port", "0"),
    "trio": ("hypercorn --worker-class trio redis_bus:app", "--bind", "127.0.0.1:0"),
}
ALICE = {"x-user": "alice"}


@contextlib.contextmanager
def processes(backend, authorizer, redis, tmp_path):
    """Run the example twice, and yield a client of each process."""
    line, *more = COMMANDS[backend]
    env = environment(
        tmp_path,
        TOPAZ_URL=authorizer.url,
        REDIS_URL=redis.url,
        INVALIDATION_KEY=os.urandom(32).hex(),
    )
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(2):
            url, _ = stack.enter_context(
                started(program(line, *more), cwd=EXAMPLES, env=env)
            )
            client = httpx.Client(base_url=url, trust_env=False, headers=ALICE)
            clients.append(stack.enter_context(client))
        yield clients


def bus_of(client):
    return client.get("/health").json()["bus"]


def all_are(state, clients):
    until(lambda: {bus_of(client)["state"] for client in clients} == {state}, 30)


def hears_of_a_change(authorizer, here, there):
    """Check that *there* hears at once what *here* has changed."""
    path = "myapp.GET.documents.__id"
    allowed = authorizer.policies[path]
    assert [there.get("/documents/1").status_code for _ in "12"] == [200, 200]
    hits = there.get("/health").json()["hits"]
    authorizer.policies[path] = False
    # The cache still has the answer.
    assert there.get("/documents/1").status_code == 200
    assert there.get("/health").json()["hits"] == hits + 1
    assert here.delete("/documents/1").status_code == 200
    # Far earlier than after 30 s, when the answer would have ended by its age.
    until(lambda: there.get("/documents/1").status_code == 403, 10)
    authorizer.policies[path] = allowed
    here.delete("/documents/1")
    until(lambda: there.get("/documents/1").status_code == 200, 10)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_processes_hear_of_changes_also_after_redis_was_killed(
    backend, authorizer, tmp_path
):
    with (
        Redis() as redis,
        processes(backend, authorizer, redis, tmp_path) as (here, there),
    ):
        all_are("reachable", (here, there))
        hears_of_a_change(authorizer, here, there)

        redis.kill()
        all_are("unreachable", (here, there))
        # Requests go on, and what is invalidated now is sent later.
        assert there.get("/documents/1").status_code == 200
        assert here.delete("/documents/1").status_code == 200
        assert bus_of(here)["waiting"] == 1
        redis.start()
        all_are("reachable", (here, there))
        until(lambda: bus_of(here)["waiting"] == 0)
        hears_of_a_change(authorizer, here, there)
        assert {bus_of(client)["outages"] for client in (here, there)} == {1}
        assert {bus_of(client)["rejected"] for client in (here, there)} == {0}
