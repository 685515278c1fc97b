"""Test that each check has one span, sends its context, and leaks no secret."""

from __future__ import annotations

import contextlib
import contextvars

import anyio
import grpc
import httpx
import pytest
from fastapi import Depends, FastAPI
from opentelemetry import baggage, context, propagate, trace
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider, sampling
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, StaticSampler
from opentelemetry.trace import SpanKind, StatusCode

from fastapi_topaz import (
    ConnectFailed,
    ConnectionPool,
    Identity,
    IdentityType,
    PoolTimeout,
    TopazConfig,
    TopazError,
    require_policy_allowed,
)
from fastapi_topaz._cli.demo import serving
from kit.configs import Requests
from kit.waiting import eventually


pytestmark = pytest.mark.real_clock

PATH = "myapp.GET.documents"
SECRET = "hunter2"
RPC = {
    "rpc.system": "grpc",
    "rpc.service": "aserto.authorizer.v2.Authorizer",
    "rpc.method": "Is",
}
STATUS = "rpc.grpc.status_code"
FAILED = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]


class Traced:
    """A configuration with recorded spans, and a request for checks."""

    def __init__(self, authorizer, *, processor=None, sampler=None, **options):
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(sampler=sampler)
        self.provider.add_span_processor(
            processor or SimpleSpanProcessor(self.exporter)
        )
        self.pool = ConnectionPool(min_connections=0, **options.pop("pool", {}))
        self.config = TopazConfig(
            authorizer_options=authorizer.options,
            policy_path_root="myapp",
            identity_provider=lambda _request: Identity(IdentityType.MANUAL, SECRET),
            resource_context_provider=lambda _request: {"card": SECRET},
            connection_pool=self.pool,
            tracer_provider=self.provider,
            **options,
        )

    async def ask(self, path=PATH):
        request = Requests({"type": "http", "path_params": {"id": SECRET}})
        return await self.config.is_allowed(request, path)

    @property
    def span(self):
        (span,) = self.exporter.get_finished_spans()
        self.exporter.clear()
        return span


@pytest.fixture
def authorizer(embedded_authorizer):
    embedded_authorizer.policies = {PATH: True, "myapp.GET.others": False}
    return embedded_authorizer


def parent_of(check):
    """
    Return the trace and span id that the authorizer received, and the sampled flag.
    """
    parts = check.metadata["traceparent"].split("-")
    _, trace_id, span_id, flags = (int(part, 16) for part in parts)
    return trace_id, span_id, bool(flags & 1)


def recorded(authorizer):
    """Allow everything, and return the list of received checks."""
    asked = []
    authorizer.policies = lambda check: asked.append(check) or True
    return asked


# -- the span -----------------------------------------------------------------------


async def test_a_check_is_one_span_with_its_outcome(authorizer):
    traced = Traced(authorizer, pool={"name": "main"})
    async with traced.pool:
        await traced.ask()
        traced.exporter.clear()
        assert await traced.ask() is True
        span = traced.span
        assert span.name == "topaz.check"
        assert span.kind is SpanKind.CLIENT
        assert span.instrumentation_scope.name == "fastapi_topaz"
        assert dict(span.attributes) == {
            **RPC,
            STATUS: 0,
            "topaz.policy_path": PATH,
            "topaz.decision": "allowed",
            "topaz.pool": "main",
            "topaz.outcome": "allowed",
        }
        assert span.status.status_code is StatusCode.UNSET
        assert not span.events, "the check did not wait"
        assert await traced.ask("myapp.GET.others") is False
        denied = traced.span
        assert denied.attributes["topaz.outcome"] == "denied"
        assert denied.attributes[STATUS] == 0


async def test_a_failed_check_records_only_its_error_type(authorizer):
    traced = Traced(authorizer)
    async with traced.pool:
        authorizer.fail(
            grpc.StatusCode.INTERNAL, f"no {SECRET} here", times=1, methods=["Is"]
        )
        with pytest.raises(grpc.aio.AioRpcError):
            await traced.ask()
        span = traced.span
        assert span.attributes["topaz.outcome"] == "error"
        assert span.attributes["error.type"] == "INTERNAL"
        assert span.status.status_code is StatusCode.ERROR
        assert SECRET not in span.to_json()


# Each status of gRPC, from the server, on both transports.
@pytest.mark.parametrize("transport", ["native", "grpcio"])
@pytest.mark.parametrize("code", FAILED, ids=lambda code: code.name)
async def test_the_status_of_a_failed_check_is_in_its_span(authorizer, code, transport):
    traced = Traced(authorizer, pool={"transport": transport})
    async with traced.pool:
        authorizer.fail(code, SECRET, methods=["Is"])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await traced.ask()
    assert caught.value.code() is code
    span = traced.span
    number, _ = code.value
    assert {key: span.attributes[key] for key in RPC} == RPC
    assert span.attributes[STATUS] == number
    assert type(span.attributes[STATUS]) is int
    assert span.attributes["error.type"] == code.name
    assert span.status.status_code is StatusCode.ERROR
    assert SECRET not in span.to_json()


@pytest.mark.parametrize("transport", ["native", "grpcio"])
async def test_a_deadline_is_a_status_too(authorizer, transport):
    traced = Traced(authorizer, pool={"transport": transport}, check_timeout=0.1)
    async with traced.pool:
        async with traced.pool.acquire():
            pass
        authorizer.delay = 30
        with pytest.raises(grpc.aio.AioRpcError):
            await traced.ask()
    span = traced.span
    assert span.attributes[STATUS] == 4
    assert span.attributes["error.type"] == "DEADLINE_EXCEEDED"


async def test_an_answer_without_a_decision_has_the_status_of_its_error(authorizer):
    authorizer.policies = {PATH: {"other": True}}
    traced = Traced(authorizer)
    async with traced.pool:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await traced.ask()
    span = traced.span
    assert span.attributes[STATUS] == caught.value.code().value[0] != 0
    assert span.attributes["topaz.outcome"] == "error"


async def test_a_check_without_a_lease_records_that(authorizer):
    traced = Traced(authorizer, pool={"max_connections": 1, "acquire_timeout": 0.01})
    async with traced.pool, traced.pool.acquire(timeout=10):
        with pytest.raises(PoolTimeout):
            await traced.ask()
    span = traced.span
    assert span.attributes["error.type"] == "PoolTimeout"
    assert STATUS not in span.attributes, "there was no call"
    assert {key: span.attributes[key] for key in RPC} == RPC


async def test_a_check_without_a_server_has_no_status(authorizer):
    authorizer.stop()
    traced = Traced(authorizer, pool={"retry_on_failure": False})
    async with traced.pool:
        with pytest.raises(ConnectFailed):
            await traced.ask()
    span = traced.span
    assert span.attributes["error.type"] == "ConnectFailed"
    assert STATUS not in span.attributes
    assert span.status.status_code is StatusCode.ERROR


async def test_a_check_whose_connection_is_lost_has_no_status(authorizer):
    traced = Traced(authorizer)
    await traced.pool.initialize()
    authorizer.delay = 30
    lost = []

    async def ask():
        with pytest.raises(TopazError) as caught:
            await traced.ask()
        lost.append(caught.value)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await eventually(lambda: authorizer.streams)
        await traced.pool.close(grace=0)
    span = traced.span
    assert span.attributes["error.type"] == type(lost[0]).__name__
    assert STATUS not in span.attributes
    assert span.attributes["topaz.outcome"] == "error"


async def test_a_sampler_sees_the_method_of_a_check(authorizer):
    seen = []

    class Watching(StaticSampler):
        def should_sample(self, *arguments, **options):
            # It passes on the attributes that it got.
            result = super().should_sample(*arguments, **options)
            seen.append(dict(result.attributes))
            return result

    traced = Traced(authorizer, sampler=Watching(sampling.Decision.RECORD_AND_SAMPLE))
    async with traced.pool:
        await traced.ask()
    (attributes,) = seen
    assert attributes.items() >= RPC.items()
    assert STATUS not in attributes


async def test_a_wait_for_a_lease_is_a_span_event(authorizer):
    traced = Traced(authorizer, pool={"max_connections": 1})
    async with traced.pool, anyio.create_task_group() as tasks:
        async with traced.pool.acquire():
            tasks.start_soon(traced.ask)
            await eventually(lambda: traced.pool.status().waiting)
        await eventually(traced.exporter.get_finished_spans)
        (event,) = traced.span.events
        assert event.name == "topaz.waited"
        assert event.attributes["topaz.wait"] > 0


async def test_a_retried_check_is_one_span_with_a_retry_mark(authorizer):
    traced = Traced(authorizer)
    async with traced.pool:
        await traced.ask()
        traced.exporter.clear()
        authorizer.fail(grpc.StatusCode.UNAVAILABLE, SECRET, times=1, methods=["Is"])
        assert await traced.ask() is True
        span = traced.span
        retry = next(event for event in span.events if event.name == "topaz.retry")
        assert dict(retry.attributes) == {"error.type": "UNAVAILABLE"}
        assert span.attributes["topaz.outcome"] == "allowed"
        assert span.attributes[STATUS] == 0, "the status of the last call"
        assert "error.type" not in span.attributes
        assert traced.pool._counters.retries == 1


async def test_a_cancelled_check_ends_its_span(authorizer):
    traced = Traced(authorizer)
    async with traced.pool:
        async with traced.pool.acquire():
            pass
        authorizer.delay = 30
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(traced.ask)
            await eventually(lambda: traced.pool.status().streams_in_use)
            tasks.cancel_scope.cancel()
        span = traced.span
        assert span.attributes["topaz.outcome"] == "cancelled"
        assert STATUS not in span.attributes
        assert span.status.status_code is StatusCode.UNSET


async def test_the_span_is_current_only_during_the_check(authorizer):
    traced = Traced(authorizer)
    tracer = traced.provider.get_tracer("application")
    async with traced.pool:
        with tracer.start_as_current_span("request") as request:
            await traced.ask()
            assert trace.get_current_span() is request
    span, _ = traced.exporter.get_finished_spans()
    assert span.parent.span_id == request.get_span_context().span_id


# -- on the wire --------------------------------------------------------------------


async def test_the_span_context_is_sent_to_the_authorizer(authorizer):
    asked = recorded(authorizer)
    traced = Traced(authorizer)
    async with traced.pool:
        await traced.ask()
    span = traced.span
    assert parent_of(asked[0]) == (span.context.trace_id, span.context.span_id, True)


async def test_an_unsampled_flag_is_sent_to_the_authorizer(authorizer):
    asked = recorded(authorizer)
    traced = Traced(authorizer, sampler=ALWAYS_OFF)
    async with traced.pool:
        await traced.ask()
    assert parent_of(asked[0])[2] is False
    assert not traced.exporter.get_finished_spans()


async def test_calls_on_an_explicit_lease_carry_the_callers_context(authorizer):
    asked = recorded(authorizer)
    traced = Traced(authorizer)
    tracer = traced.provider.get_tracer("application")
    async with traced.pool, traced.pool.acquire() as conn:
        with tracer.start_as_current_span("request") as span:
            token = context.attach(baggage.set_baggage("tenant", "t1"))
            await conn.decisions(policy_path=PATH)
            context.detach(token)
        await conn.decisions(policy_path=PATH)
    assert parent_of(asked[0])[1] == span.get_span_context().span_id
    assert asked[0].metadata["baggage"] == "tenant=t1"
    assert "traceparent" not in asked[1].metadata


async def test_metadata_of_the_caller_wins(authorizer):
    given = f"00-{1:032x}-{2:016x}-01"
    sent = []

    class Recording:
        async def call(self, method, request, *, timeout, metadata):
            sent.append(list(metadata))
            return b""

        async def probe(self, timeout): ...

        async def close(self, grace): ...

    class Connector:
        async def connect(self, timeout):
            return Recording()

    tracer = TracerProvider().get_tracer("application")
    async with ConnectionPool(connector=Connector()) as pool, pool.acquire() as conn:
        with tracer.start_as_current_span("request"):
            await conn.call("/a.B/C", b"", metadata=[("traceparent", given)])
    assert sent == [[("traceparent", given)]]


class Odd(TextMapPropagator):
    """Puts values into the carrier that gRPC would not send."""

    fields = frozenset()

    def extract(self, carrier, context=None, getter=None): ...

    def inject(self, carrier, context=None, setter=None):
        carrier.update(
            {"X-Trace": "1", "Größe": "2", "x-a": "3\n4", "x-b": "ü", "x-c": 5}
        )
        carrier.update({"y-bin": "6"})


class Raising(Odd):
    def inject(self, carrier, context=None, setter=None):
        raise OSError("no propagation")


@pytest.mark.parametrize("propagator", [Odd(), Raising()])
async def test_a_propagator_cannot_break_a_check(
    propagator, authorizer, monkeypatch, caplog
):
    monkeypatch.setattr(propagate, "inject", propagator.inject)
    monkeypatch.setattr("fastapi_topaz._telemetry.tracing._broken", set())
    asked = recorded(authorizer)
    traced = Traced(authorizer)
    async with traced.pool:
        for _ in range(3):
            assert await traced.ask() is True
    odd = {key for key in asked[0].metadata if key[:2] in {"x-", "y-", "gr"}}
    assert odd <= {"x-trace", "grpc-accept-encoding"}
    assert ("x-trace" in asked[0].metadata) == (type(propagator) is Odd)
    failed = sum("propagating" in record.message for record in caplog.records)
    assert failed == (type(propagator) is Raising)


# -- errors, and missing providers ----------------------------------------------------


class Broken(SpanProcessor):
    def __init__(self, moment):
        self.moment = moment

    def on_start(self, span, parent_context=None):
        if self.moment == "start":
            raise OSError("no collector")
        if self.moment == "event":
            span.add_event = self.on_end
            span.set_attribute = self.on_end

    def on_end(self, *_args):
        if self.moment != "start":
            raise OSError("no collector")


@pytest.mark.parametrize("moment", ["start", "event", "end"])
async def test_a_tracing_error_fails_no_check(moment, authorizer, monkeypatch, caplog):
    monkeypatch.setattr("fastapi_topaz._telemetry.tracing._broken", set())
    traced = Traced(authorizer, processor=Broken(moment))
    async with traced.pool:
        authorizer.fail(grpc.StatusCode.UNAVAILABLE, "gone", times=1, methods=["Is"])
        for _ in range(3):
            assert await traced.ask() is True
        assert trace.get_current_span() is trace.INVALID_SPAN
    assert any("checks continue without it" in r.message for r in caplog.records)


async def test_a_tracing_error_traceback_has_no_authorizer_details(
    authorizer, monkeypatch, caplog
):
    monkeypatch.setattr("fastapi_topaz._telemetry.tracing._broken", set())
    traced = Traced(authorizer, processor=Broken("end"))
    async with traced.pool:
        authorizer.fail(grpc.StatusCode.INTERNAL, f"no {SECRET} here")
        with pytest.raises(grpc.aio.AioRpcError):
            await traced.ask()
    assert "OSError: no collector" in caplog.text
    assert SECRET not in caplog.text


async def test_a_garbage_collected_check_ends_its_span_silently(authorizer, caplog):
    authorizer.delay = 30
    traced = Traced(authorizer)
    async with traced.pool:
        check = traced.ask()

        class Never:
            def __await__(self):
                yield from check.__await__()

        # Run it to its first wait, like a task without references. Then destroy it.
        step = Never().__await__()
        with contextlib.suppress(BaseException):
            contextvars.Context().run(step.send, None)
        step.close()
        check.close()
    assert "Failed to detach" not in caplog.text


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_tracer_provider_set_late_is_used(backend, authorizer, run_program):
    program = f"""
        import anyio
        from fastapi import Request
        from fastapi_topaz import *
        from opentelemetry import trace

        config = TopazConfig(
            authorizer_options=AuthorizerOptions(
                url={authorizer.url!r}, insecure=True
            ),
            policy_path_root="myapp",
            identity_provider=lambda request: Identity(IdentityType.NONE),
        )
        request = Request({{"type": "http", "path_params": {{}}}})

        async def main():
            async with config.connection_pool:
                assert await config.is_allowed(request, {PATH!r})

                from opentelemetry.sdk.trace import TracerProvider
                from opentelemetry.sdk.trace.export import SimpleSpanProcessor
                from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
                    InMemorySpanExporter,
                )

                exporter = InMemorySpanExporter()
                provider = TracerProvider()
                provider.add_span_processor(SimpleSpanProcessor(exporter))
                trace.set_tracer_provider(provider)
                assert await config.is_allowed(request, {PATH!r})
                print([span.name for span in exporter.get_finished_spans()])

        anyio.run(main, backend={backend!r})
    """
    ended = run_program(program)
    assert ended.out.strip() == "['topaz.check']", ended.err


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_span_of_a_request_is_the_parent_of_its_check(backend, authorizer):
    asked = recorded(authorizer)
    traced = Traced(authorizer)
    app = FastAPI(lifespan=traced.config.lifespan)
    tracer = traced.provider.get_tracer("application")

    async def traced_request():
        # The outer span, as an instrumentation of FastAPI creates it.
        with tracer.start_as_current_span("request"):
            yield

    guard = Depends(require_policy_allowed(traced.config, PATH))

    @app.get("/", dependencies=[Depends(traced_request), guard])
    async def index(): ...

    with serving(app, backend) as url:
        for _ in range(3):
            assert httpx.get(url).status_code == 200
    spans = traced.exporter.get_finished_spans()
    checks = [span for span in spans if span.name == "topaz.check"]
    requests = {span.context.span_id for span in spans if span.name == "request"}
    assert {span.parent.span_id for span in checks} == requests
    assert len(requests) == 3
    assert [parent_of(check)[1] for check in asked] == [
        span.context.span_id for span in checks
    ]


def test_an_invalid_tracer_provider_is_rejected(authorizer):
    with pytest.raises(TypeError, match="tracer_provider must be a TracerProvider"):
        TopazConfig(
            authorizer_options=authorizer.options,
            policy_path_root="myapp",
            identity_provider=lambda _request: Identity(IdentityType.NONE),
            tracer_provider=object(),
        )
