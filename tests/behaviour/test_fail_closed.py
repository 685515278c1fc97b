"""
Test that no fault makes a check pass, with each fallback, over real sockets.

For each fault, one application for each fallback asks the same server through the same
proxy, before and during the fault. The tests hold three things against each other: the
answers that the callers got, what the server would say, and what the application
reports in metrics, spans and log lines.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import anyio
import attrs
import grpc
import httpx
import pytest
from anyio import to_thread
from aserto.authorizer.v2 import Decision as Said
from aserto.authorizer.v2 import IsRequest, IsResponse
from fastapi import Depends, FastAPI
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fastapi_topaz import (
    AuthorizerOptions,
    CircuitBreaker,
    ConnectionPool,
    DecisionCache,
    TopazConfig,
    TopazError,
    require_policy_allowed,
)
from kit.backends import alternating
from kit.configs import Requests, user
from kit.faultkit.frames import FrameServer, answer, message
from kit.faultkit.http2 import Http2Server
from kit.faultkit.proxy import Proxy
from kit.faultkit.unavailable import headers, http, trailers


pytestmark = pytest.mark.real_clock

PATIENCE = 0.25
"""Seconds that a check may take during the fault."""

STRATEGIES = {
    "error": "error",
    "deny": "deny",
    "cache_then_error": "cache_then_error",
    "cache_then_deny": "cache_then_deny",
    "cache_then_allow": "cache_then_allow",
    "allow": "allow",
    # It allows each check of which no older answer says otherwise.
    "custom": lambda _http, _path, _resource, cached, _error: cached is not False,
    "custom without permission": lambda *_: True,
}
MAY_ALLOW = {"cache_then_allow", "allow", "custom"}
"""The configurations that permit to allow without an answer."""

POLICIES = ("open", "shut")
USERS = ("known", "new")
"""The first one has asked before the fault, so there are older answers for it."""


# -- servers that decide by the policy -------------------------------------------------


def verdict(request):
    """Return the answer to an encoded question: policies that end in "open" allow."""
    path = IsRequest.FromString(request).policy_context.path
    allowed = path.endswith(".open")
    return IsResponse(decisions=[Said(decision="allowed", **{"is": allowed})])


class Judge(Http2Server):
    """Answers by the policy, until a fault is set."""

    def handle(self, call):
        if call.method == "Is":
            call.message = verdict(call.asked[5:]).SerializeToString()
        super().handle(call)


def judge(wire, stream, method):
    """Answer by the policy, frame by frame."""
    body = verdict(wire.asked[stream]).SerializeToString() if method == "Is" else b""
    answer(body=message(body))(wire, stream, method)


def lie(**changes):
    """Answer each check wrongly, and other calls as usual."""

    def script(wire, stream, method):
        (answer(**changes) if method == "Is" else judge)(wire, stream, method)

    return script


def said(*values, name="allowed"):
    """Return an answer with these values of one decision."""
    decisions = [Said(decision=name, **{"is": value}) for value in values]
    return message(IsResponse(decisions=decisions).SerializeToString())


# -- the faults ------------------------------------------------------------------------


@attrs.frozen
class Fault:
    """What goes wrong: of the network, or of a server."""

    server: type = Judge
    network: object = lambda _proxy: None
    behaviour: object = lambda _server: None
    # Whether checks may still get their answers, perhaps after a retry.
    answers: bool = False


def refuse(proxy):
    proxy.refuse()
    proxy.cut()


def cut_after(act):
    def network(proxy):
        act(proxy)
        proxy.cut()

    return network


def scripted(act):
    """Answer each call by *act*."""
    return lambda server: server._script(act, None)


def status(code):
    return Fault(behaviour=lambda server: server.status(code, "secret of alice"))


def wrong(**changes):
    def behaviour(server):
        server.script = lie(**changes)

    return Fault(server=partial(FrameServer, judge), behaviour=behaviour)


ANOTHER_KIND = "an allow of another kind"

FAULTS = {
    "none": Fault(answers=True),
    "refuse": Fault(network=refuse),
    "hang": Fault(network=cut_after(Proxy.hang)),
    "half_open": Fault(network=Proxy.half_open),
    "freeze": Fault(network=Proxy.freeze),
    "delay": Fault(network=lambda proxy: proxy.delay(30)),
    "slow_handshake": Fault(network=cut_after(lambda p: p.slow_handshake(30))),
    "reset_mid_response": Fault(
        network=lambda proxy: proxy.reset_mid_response(5), answers=True
    ),
    "truncate_mid_response": Fault(
        network=lambda proxy: proxy.truncate_mid_response(5), answers=True
    ),
    "cut": Fault(network=Proxy.cut, answers=True),
    "goaway": Fault(behaviour=Http2Server.goaway, answers=True),
    "goaway, an error": Fault(behaviour=lambda server: server.goaway(2), answers=True),
    "refuse_streams": Fault(behaviour=Http2Server.refuse_streams),
    "refuse_streams once": Fault(
        behaviour=lambda server: server.refuse_streams(1), answers=True
    ),
    **{
        f"reset_streams {code}": Fault(
            behaviour=lambda server, code=code: server.reset_streams(None, code)
        )
        for code in (0, 2, 8, 11)
    },
    "truncate": Fault(behaviour=Http2Server.truncate),
    "answer_size": Fault(behaviour=lambda server: server.answer_size(5 * 1024 * 1024)),
    "hold": Fault(behaviour=Http2Server.hold),
    "set_max_concurrent_streams": Fault(
        behaviour=lambda server: server.set_max_concurrent_streams(0)
    ),
    **{
        f"status {code.name}": status(code)
        for code in grpc.StatusCode
        if code is not grpc.StatusCode.OK
    },
    "status 99": status(99),
    "http 200": Fault(behaviour=scripted(http(200, body=b"<html>allowed"))),
    "http 403": Fault(behaviour=scripted(http(403))),
    "http 503": Fault(behaviour=scripted(http(503, body=b"<html>"))),
    "unavailable, headers": Fault(behaviour=scripted(headers("no healthy upstream"))),
    "unavailable, trailers": Fault(behaviour=scripted(trailers("upstream is gone"))),
    "no message": wrong(body=b""),
    "an empty message": wrong(body=message(b"")),
    "no decision": wrong(body=said()),
    "another decision": wrong(body=said(True, name="visible")),
    "garbage": wrong(body=message(b"\xff\xfe allowed")),
    "a cut message": wrong(body=said(True)[:-1]),
    "two messages": wrong(body=said(True) * 2),
    "an allow with an error": wrong(
        body=said(True), tail=[("grpc-status", "7"), ("grpc-message", "no")]
    ),
    "an allow without a status": wrong(body=said(True), tail=[("x", "y")]),
    # gRPC's core hides the content-type: see `test_hostile_wire.py`.
    ANOTHER_KIND: wrong(
        body=said(True), head=[(":status", "200"), ("content-type", "text/html")]
    ),
}


# The package treats these statuses like others, so they run in the slow tests only.
ALIKE = (
    *("ALREADY_EXISTS", "ABORTED", "OUT_OF_RANGE", "DATA_LOSS"),
    "FAILED_PRECONDITION",
)


def test_each_fault_of_the_kit_takes_part():
    names = {
        name
        for kit in (Proxy, Http2Server)
        for name, member in vars(kit).items()
        if callable(member) and not name.startswith("_")
    }
    no_faults = {"stop", "url", "listen", "accept", "route", "heal"}
    no_faults |= {"open_by_backend", "handle", "let_go"}
    assert names - no_faults <= {name.split()[0].rstrip(",") for name in FAULTS}


# -- applications and what they see ----------------------------------------------------


@attrs.frozen(eq=False)
class App:
    """An application with one of the fallbacks, and what its callers saw."""

    name: str
    config: TopazConfig
    # Whether the server may answer during the fault, too.
    answers: bool
    seen: Counter = attrs.Factory(Counter)
    reported: list = attrs.Factory(list)
    changes: list = attrs.Factory(list)
    wrong: list = attrs.Factory(list)
    ends_by_status: dict = attrs.Factory(
        lambda: {200: "allowed", 403: "denied", 500: "error", 503: "error"}
    )

    def ends(self):
        """Return the ends that the callers saw, whatever asked."""
        ends = Counter()
        for (_source, end), number in self.seen.items():
            ends[end] += number
        return ends

    @property
    def root(self):
        return re.sub(r"\W", "_", self.name)

    @classmethod
    def of(cls, name, fault, options, meters, tracers):
        reported, changes = [], []
        config = TopazConfig(
            authorizer_options=options,
            policy_path_root="app",
            identity_provider=user,
            connection_pool=ConnectionPool(
                min_connections=0, max_connections=2, max_retries=0, name=name
            ),
            check_timeout=30.0,
            decision_cache=DecisionCache(
                ttl_seconds=0, denied_ttl_seconds=0, stale_ttl_seconds=60
            ),
            circuit_breaker=CircuitBreaker(
                failure_threshold=4,
                on_state_change=lambda before, after, _: changes.append(
                    (before, after)
                ),
            ),
            fallback=STRATEGIES[name],
            allow_unsafe_fallback=name in MAY_ALLOW,
            on_fallback=lambda _http, _path, cached, allowed: reported.append(
                (cached is not None, allowed)
            ),
            meter_provider=meters,
            tracer_provider=tracers,
        )
        return cls(name, config, fault.answers, reported=reported, changes=changes)

    def path(self, policy):
        return f"{self.root}.GET.{policy}"

    def asgi(self):
        app = FastAPI()
        for policy in POLICIES:
            guard = require_policy_allowed(self.config, self.path(policy))
            app.get(f"/{policy}", dependencies=[Depends(guard)])(lambda: "passed")
        return app

    async def decide(self, who, policy, patience=30.0):
        """Ask as code of the application does, and note the end."""
        request = Requests(
            {
                "type": "http",
                "headers": [(b"user", who.encode())],
                "path_params": {},
            }
        )
        end = "cancelled"
        with anyio.move_on_after(patience):
            try:
                decision = await self.config.decide(request, self.path(policy))
            except (TopazError, grpc.aio.AioRpcError):
                end = "error"
            else:
                end = "allowed" if decision.allowed else "denied"
                self.judge(decision, who, policy)
        self.seen["manual", end] += 1
        return end

    def may_allow(self, who):
        """Return whether the fallback may allow the policy that the server denies."""
        # The older answer for the first user says no.
        return self.name == "allow" or (self.name in MAY_ALLOW and who != "known")

    def judge(self, decision, who, policy):
        """Note an allow that neither the server nor the configuration permits."""
        if not decision.allowed:
            return
        permitted = {
            # The server allows this policy and no other one.
            "authorizer": policy == "open",
            "shared": policy == "open",
            "cache": False,
            "stale": policy == "open"
            and (who == "known" or self.answers)
            and self.name.startswith(("cache_then", "custom")),
            "fallback": self.name in MAY_ALLOW
            and (policy == "open" or self.may_allow(who)),
        }
        if not permitted[decision.origin]:
            self.wrong.append((decision, who, policy))

    async def request(self, client, who, policy):
        """Ask as a client of the application does, and note the end."""
        response = await client.get(f"/{policy}", headers={"user": who})
        end = self.ends_by_status[response.status_code]
        self.seen["dependency", end] += 1
        if end == "allowed" and policy != "open" and not self.may_allow(who):
            self.wrong.append((response.status_code, who, policy))


@attrs.frozen(eq=False)
class World:
    """All applications, and the reports of all of them."""

    apps: list
    reader: InMemoryMetricReader
    spans: InMemorySpanExporter

    def metrics(self):
        """Return the numbers: by metric, by pool, and by the other labels."""
        found = {}
        data = self.reader.get_metrics_data()
        for resource in data.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    for point in metric.data.data_points:
                        labels = dict(point.attributes)
                        pool = labels.pop("pool")
                        value = getattr(point, "value", None)
                        number = point.count if value is None else value
                        if number:
                            key = tuple(labels[name] for name in sorted(labels))
                            found.setdefault((metric.name, pool), {})[key] = number
        return found


@asynccontextmanager
async def world_of(fault):
    with fault.server() as server, Proxy([server.port]) as proxy:
        options = AuthorizerOptions(url=proxy.url, insecure=True)
        reader, exporter = InMemoryMetricReader(), InMemorySpanExporter()
        meters, tracers = MeterProvider([reader]), TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(exporter))
        apps = [App.of(name, fault, options, meters, tracers) for name in STRATEGIES]
        world = World(apps, reader, exporter)
        try:
            yield world, server, proxy
        finally:
            proxy.heal()
            if isinstance(server, Http2Server):
                server.heal()
            meters.shutdown()


async def ask_all(app):
    """Ask everything at once, once more one after the other, and give up once."""
    transport = httpx.ASGITransport(app.asgi())
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        async with anyio.create_task_group() as tasks:
            for who in USERS:
                for policy in POLICIES:
                    tasks.start_soon(app.decide, who, policy)
                    tasks.start_soon(app.request, client, who, policy)
            tasks.start_soon(app.decide, "hurried", "open", 0.05)
        for policy in POLICIES:
            await app.request(client, "new", policy)


# -- what is reported -----------------------------------------------------------------


MORE = re.compile(r"(\d+) more in the last")


def logged(caplog, line, reason):
    """Return how many events the log has: those with a line, and those only counted."""
    total = 0
    for record in caplog.records:
        text = record.getMessage()
        if re.search(f"{reason}.*: {MORE.pattern}", text):
            total += int(MORE.search(text)[1])
        elif re.search(line, text):
            total += 1 + sum(map(int, MORE.findall(text)))
    return total


def assert_reports_agree(world, caplog):
    """Callers, metrics, spans and callbacks agree for each app; logs, for all."""
    metrics, spans = world.metrics(), world.spans.get_finished_spans()
    for app in world.apps:
        counts = partial(lambda app, name: metrics.get((name, app.name), {}), app)
        seen = Counter({("policy", *reversed(key)): n for key, n in app.seen.items()})
        assert counts("topaz_auth_requests") == seen, app.name
        own = [span for span in spans if span.attributes["topaz.pool"] == app.name]
        outcomes = Counter(span.attributes["topaz.outcome"] for span in own)
        assert outcomes == app.ends()
        label = "custom" if app.name.startswith("custom") else app.name
        fell = Counter(
            (str(was_cached).lower(), "allowed" if allowed else "denied", label)
            for was_cached, allowed in app.reported
        )
        assert counts("topaz_fallback") == fell
        by_fallback = Counter(
            span.attributes["topaz.outcome"]
            for span in own
            if span.attributes.get("topaz.origin") in {"stale", "fallback"}
        )
        events = [event.name for span in own for event in span.events]
        assert events.count("topaz.fallback") == by_fallback.total() == fell.total()
        assert by_fallback["allowed"] == sum(
            n for k, n in fell.items() if "allowed" in k
        )
        errors = sum(counts("topaz_errors").values())
        assert errors == app.ends()["error"] + fell.total()
        assert counts("topaz_circuit_transitions") == Counter(app.changes)
        asked = sum(counts("topaz_cache_misses").values())
        asked += sum(counts("topaz_cache_hits").values())
        asked += sum(counts("topaz_cache_shared").values())
        assert asked == sum(n for end, n in app.ends().items() if end != "cancelled")
    undecided = sum(app.ends()["error"] for app in world.apps)
    assert logged(caplog, "^no decision on ", "no decision: ") == undecided
    fallen = sum(len(app.reported) for app in world.apps)
    decided = r"fallback \S+ (allowed|denied) "
    assert logged(caplog, rf"^the {decided}a check of ", decided) == fallen


@alternating(
    FAULTS,
    rare={f"status {name}" for name in ALIKE},
    marks={ANOTHER_KIND: [pytest.mark.native]},
)
async def test_no_fault_lets_a_check_pass(name, caplog):
    fault = FAULTS[name]
    caplog.set_level(logging.INFO, logger="fastapi_topaz")
    async with world_of(fault) as (world, server, proxy), AsyncExitStack() as opened:
        for app in world.apps:
            await opened.enter_async_context(app.config.lifespan(None))
            assert await app.decide("known", "open") == "allowed"
            assert await app.decide("known", "shut") == "denied"
        for app in world.apps:
            if name == "status NOT_FOUND":
                # 403 is the answer to a client whose identity is not known. So no check
                # may end otherwise, with a deadline and the denial of a fallback.
                app.ends_by_status[403] = "error"
            else:
                app.config.check_timeout = PATIENCE
        await to_thread.run_sync(fault.behaviour, server)
        await to_thread.run_sync(fault.network, proxy)
        async with anyio.create_task_group() as tasks:
            for app in world.apps:
                tasks.start_soon(ask_all, app)
    for app in world.apps:
        assert app.wrong == [], app.name
        if not fault.answers:
            said = Counter(
                span.attributes["topaz.outcome"]
                for span in world.spans.get_finished_spans()
                if span.attributes["topaz.pool"] == app.name
                and span.attributes["topaz.outcome"] in {"allowed", "denied"}
                and "topaz.origin" not in span.attributes
            )
            assert said == {"allowed": 1, "denied": 1}, "only before the fault"
    assert_reports_agree(world, caplog)
    assert "secret of alice" not in caplog.text
