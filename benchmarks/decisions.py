"""
Measures what the layers of a decision cost: the request's memo, and the cache.

    .venv/bin/python benchmarks/decisions.py [--rounds 30] [--calls 500]
        [--backend asyncio uvloop trio] [--quick] [--save]

"question" builds the question, with a new request and the identity and resource of the
application. Each other contestant does that, too. "hit" is answered from the cache, and
"same request" by an earlier check of its request. The others ask an authorizer in
another process: "bare" without the layers, "memo" as without any configuration, and
"miss" with a cache whose answers are not used.
"""

from __future__ import annotations

import gc
import time

import anyio
from _rounds import Goal, Race, parsed, parser, save, versions
from _server import POLICY, authorizer
from starlette.requests import Request

from fastapi_topaz import (
    ConnectionPool,
    DecisionCache,
    Identity,
    IdentityType,
    TopazConfig,
)
from fastapi_topaz._app.asking import AskPool, Observe, Retry, RetryTokens


MOST = 8.0
"""Microseconds that a hit may take beyond its question."""

ALICE = Identity(IdentityType.SUB, "alice")
HITS = 20
"""Hits are so fast that each measurement takes this many times as many."""


def request():
    return Request({"type": "http", "path_params": {"id": "1"}, "headers": []})


def config_of(options, **settings):
    return TopazConfig(
        authorizer_options=options,
        policy_path_root="myapp",
        identity_provider=lambda _request: ALICE,
        resource_context_provider=lambda _request: {"owner": "bob", "size": 7},
        connection_pool=ConnectionPool(
            min_connections=1, max_connections=1, eager_init=True
        ),
        **settings,
    )


def question(config):
    return lambda: config._question(request(), POLICY)


def decide(config, **options):
    return lambda: config.decide(request(), POLICY, **options)


def same_request(config):
    one = request()
    return lambda: config.decide(one, POLICY)


def bare(config):
    pool = lambda: config.connection_pool  # noqa: E731
    below = Retry(AskPool(pool), lambda: None, RetryTokens(lambda: 10))
    layers = config._layers
    config._ask = Observe(below, layers.tracing, pool, layers.metrics, layers.limit)
    return decide(config)


class Contestant:
    """One way to get a decision. A call measures it: microseconds of CPU."""

    def __init__(self, make, options, backend, calls, **settings):
        self._make = make
        self._options = options
        self._backend = backend
        self._calls = calls
        self._settings = settings

    def __call__(self):
        uvloop = self._backend == "uvloop"
        return anyio.run(
            self._measure,
            backend="asyncio" if uvloop else self._backend,
            backend_options={"use_uvloop": True} if uvloop else {},
        )

    async def _measure(self):
        cache = DecisionCache(ttl_seconds=3600) if self._settings.get("cache") else None
        config = config_of(self._options, decision_cache=cache)
        async with config.connection_pool:
            check = self._make(config)
            for _ in range(min(50, self._calls)):
                await check()
            gc.collect()
            began = time.process_time()
            for _ in range(self._calls):
                await check()
            return (time.process_time() - began) / self._calls * 1e6


def race(given, options, backend):
    many = given.calls * HITS
    hits = {
        "question": Contestant(question, options, backend, many),
        "hit": Contestant(decide, options, backend, many, cache=True),
        "same request": Contestant(same_request, options, backend, given.calls),
    }
    found = Race(f"Answers that need no call, {backend}", "us of CPU")
    found.run(hits, given.rounds)
    # The goal is a time, so the ratio depends on the machine.
    pairs = zip(found.rounds["hit"], found.rounds["question"], strict=True)
    beyond = sorted(hit - asked for hit, asked in pairs)[given.rounds // 2]
    most = 1 + MOST / found.median("question")
    goals = [Goal("hit", ("question",), most, f"a hit takes at most {MOST:g} us more")]
    found.show("question", goals)
    print(f"  a hit takes {beyond:.1f} us more than its question")
    save(given, f"decisions-hits-{backend}", found.data(goals))

    def miss(config):
        return decide(config, max_age=0)

    calls = {
        "bare": Contestant(bare, options, backend, given.calls),
        "memo": Contestant(decide, options, backend, given.calls),
        "miss": Contestant(miss, options, backend, given.calls, cache=True),
    }
    found = Race(f"Answers of the authorizer, {backend}", "us of CPU")
    found.run(calls, given.rounds)
    goals = [Goal("memo", ("bare",), 1.05), Goal("miss", ("bare",), 1.10)]
    found.show("bare", goals)
    save(given, f"decisions-calls-{backend}", found.data(goals))


def main(given):
    print(versions("grpcio", "anyio", "uvloop", "trio"))
    with authorizer() as options:
        for backend in given.backend:
            race(given, options, backend)


if __name__ == "__main__":
    backends = ["asyncio", "uvloop", "trio"]
    arguments = parser(__doc__, rounds=30)
    arguments.add_argument("--calls", type=int, default=500)
    arguments.add_argument("--backend", nargs="+", choices=backends, default=backends)
    main(parsed(arguments, rounds=2, calls=50, backend=["asyncio"]))
