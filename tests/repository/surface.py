"""
Print the surface that users rely on: names, signatures, logs, metrics and spans.

    python tests/repository/surface.py > tests/repository/surface.txt

`test_surface.py` compares. A change of the internals does not change the text.
"""

from __future__ import annotations

import ast
import contextlib
import enum
import inspect
import sys
from collections import defaultdict
from pathlib import Path

import anyio
import grpc
from opentelemetry.metrics import Meter, MeterProvider, NoOpMeter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.requests import Request

import fastapi_topaz
import fastapi_topaz.testing
from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionPool,
    Identity,
    IdentityType,
    TopazConfig,
)


PACKAGE = Path(fastapi_topaz.__file__).parent
MODULES = [fastapi_topaz, fastapi_topaz.exceptions, fastapi_topaz.testing]
LEVELS = ["debug", "info", "warning", "error", "critical"]


def described(name, thing):
    """Yield a line for *thing*, and for each public member of a class."""
    if not inspect.isclass(thing):
        yield name + (
            str(inspect.signature(thing)) if inspect.isfunction(thing) else ""
        )
        return
    bases = [base.__name__ for base in thing.__bases__ if is_public(base)]
    yield f"class {name}({', '.join(bases)})"
    if issubclass(thing, enum.Enum):
        yield from (f"{name}.{member.name} = {member.value!r}" for member in thing)
        return
    if not issubclass(thing, Exception) and not getattr(thing, "_is_protocol", False):
        yield f"{name}{inspect.signature(thing)}"
    builtin = [base for base in thing.__mro__ if base.__module__ == "builtins"]
    for member, value in sorted(inspect.getmembers_static(thing)):
        is_there = hasattr(thing, member) and not member.startswith("_")
        if is_there and not any(hasattr(base, member) for base in builtin):
            yield described_member(f"{name}.{member}", value)


def described_member(name, value):
    function = getattr(value, "__func__", value)  # a static or a class method
    if not inspect.isfunction(function):
        return name
    kind = "async " if inspect.iscoroutinefunction(function) else ""
    return f"{kind}{name}{inspect.signature(function)}"


def is_public(cls):
    return any(cls.__name__ in module.__all__ for module in MODULES) or (
        cls.__module__ in {"builtins", "enum", "typing"} and cls is not object
    )


def names():
    for module in MODULES:
        for name in sorted(module.__all__):
            yield from described(f"{module.__name__}.{name}", getattr(module, name))


def log_lines():
    """
    Yield the name of each logger with the levels of its lines, read from the source.
    """
    levels = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        loggers = {
            call.args[0].value
            for call in calls
            if ast.unparse(call.func) == "logging.getLogger"
            and call.args
            and isinstance(call.args[0], ast.Constant)
        }
        # The rate-limited lines of a module without its own logger.
        shared = "fastapi" if path.parent.name == "_app" else "pool"
        for logger in loggers or {f"fastapi_topaz.{shared}"}:
            levels[logger].update(level for call in calls for level in levels_of(call))
    for logger, found in sorted(levels.items()):
        if logger.startswith("fastapi_topaz") and found:
            yield f"{logger}: {', '.join(sorted(found, key=LEVELS.index))}"


def levels_of(call):
    """Yield the levels of the line that *call* logs, if it logs."""
    owner, _, method = ast.unparse(call.func).rpartition(".")
    if owner in {"logger", "_logger", "_LOGGER"} and method in {*LEVELS, "exception"}:
        yield method.replace("exception", "error")
    elif owner.endswith("limit") and method == "report":
        for node in ast.walk(call.args[0]):
            if isinstance(node, ast.Attribute) and node.attr.lower() in LEVELS:
                yield node.attr.lower()


class Recorder(MeterProvider):
    """Records which instruments are created."""

    def __init__(self):
        self.made = set()

    def get_meter(self, name, *args, **kwargs):
        recorder = self

        class Recording(NoOpMeter):
            pass

        for method in Meter.__abstractmethods__:
            if method.startswith("create_"):

                def create(self, name, *args, unit="", _kind=method, **kwargs):
                    kind = _kind.removeprefix("create_")
                    recorder.made.add(f"{name}: {kind}, unit {unit!r}")
                    return getattr(NoOpMeter, _kind)(self, name, *args, **kwargs)

                setattr(Recording, method, create)
        return Recording(name)


def metrics():
    recorder = Recorder()
    ConnectionPool(meter_provider=recorder, semantic_conventions=True)
    TopazConfig(
        authorizer_options=AuthorizerOptions(),
        policy_path_root="app",
        identity_provider=lambda _request: Identity(IdentityType.NONE),
        meter_provider=recorder,
    )
    yield from sorted(recorder.made)


async def spans():
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with fastapi_topaz.testing.EmbeddedAuthorizer({"app.GET.x": True}) as authorizer:
        config = TopazConfig(
            authorizer_options=authorizer.options,
            policy_path_root="app",
            identity_provider=lambda _request: Identity(IdentityType.NONE),
            tracer_provider=provider,
        )
        scope = {"type": "http", "path": "/x", "headers": []}
        async with config.connection_pool:
            # The second one is answered by the first.
            request = Request({**scope})
            for _ in range(2):
                await config.is_allowed(request, "app.GET.x")
            authorizer.fail("PERMISSION_DENIED", "no")
            with anyio.fail_after(30):
                with contextlib.suppress(grpc.RpcError):  # its span counts
                    await config.is_allowed(Request({**scope}), "app.GET.x")
    found = {
        (span.name, *sorted(span.attributes)) for span in exporter.get_finished_spans()
    }
    return [f"{name}: {', '.join(keys)}" for name, *keys in sorted(found)]


def surface():
    """Return the complete text."""
    parts = {
        "names": names(),
        "loggers and their levels": log_lines(),
        "metrics": metrics(),
        "spans and their attributes": anyio.run(spans),
    }
    return "\n\n".join(
        "\n".join([f"# {title}", *lines]) for title, lines in parts.items()
    )


if __name__ == "__main__":
    sys.stdout.write(surface() + "\n")
