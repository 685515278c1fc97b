"""Test that the page on other gRPC services is true: its code runs on a real server."""

from __future__ import annotations

import re
import sys
import textwrap
import types

import anyio
import grpc.aio
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.wrappers_pb2 import StringValue

from fastapi_topaz import ConnectionPool, GrpcConnector, Target
from kit.backends import backends
from kit.examples import ROOT
from kit.greeter import SERVICE, greeter_server
from kit.pages import DOCS, codes


pytestmark = pytest.mark.real_clock

PAGE = (DOCS / "services.md").read_text()
MAKE, GREET, CALL = codes(DOCS / "services.md", "python")


def message(name, field):
    """Return the class of a message with one text, as protoc generates it."""
    file = FileDescriptorProto(name=f"{name}.proto", package="greeter.v1")
    added = file.message_type.add(name=name).field.add(name=field, number=1)
    added.type, added.label = added.TYPE_STRING, added.LABEL_OPTIONAL
    pool = DescriptorPool()
    pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName(f"greeter.v1.{name}"))


@pytest.fixture
def generated(monkeypatch):
    """The modules that protoc generates from greeter.proto."""
    messages = types.ModuleType("greeter_pb2")
    messages.HelloRequest = message("HelloRequest", "name")
    messages.HelloReply = message("HelloReply", "message")

    class GreeterStub:
        def __init__(self, channel):
            self.SayHello = channel.unary_unary(
                f"{SERVICE}/SayHello",
                request_serializer=messages.HelloRequest.SerializeToString,
                response_deserializer=messages.HelloReply.FromString,
                _registered_method=True,
            )

    stubs = types.ModuleType("greeter_pb2_grpc")
    stubs.GreeterStub = GreeterStub
    monkeypatch.setitem(sys.modules, "greeter_pb2", messages)
    monkeypatch.setitem(sys.modules, "greeter_pb2_grpc", stubs)


@backends
def test_the_code_of_the_page_greets(backend, generated):
    with greeter_server() as greeter:
        names = {}
        for code in (MAKE.replace("localhost:50051", greeter.url), GREET):
            exec(compile(code, "services.md", "exec", dont_inherit=True), names)

        async def program():
            async with names["pool"]:
                return await names["greet"]("Ann")

        assert anyio.run(program, backend=backend) == "Hello, Ann"
        assert [name for name, *_ in greeter.asked] == ["Ann"]


@backends
def test_the_call_without_a_stub_is_answered(backend):
    body = textwrap.indent(CALL, "    ")
    names = {}
    exec(f"async def program(pool):\n{body}\n    return answer\n", names)

    async def run(url):
        connector = GrpcConnector(Target(url=url, insecure=True))
        async with ConnectionPool(connector=connector) as pool:
            return await names["program"](pool)

    with greeter_server() as greeter:
        answer = anyio.run(run, greeter.url, backend=backend)
    assert answer == StringValue(value="Hello, ").SerializeToString()


def test_the_arguments_of_a_method_are_in_the_table():
    table = PAGE.partition("## What a method of a stub takes")[2].partition("##")[0]
    call = grpc.aio.UnaryUnaryMultiCallable.__call__
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [
        name for name in call.__kwdefaults__ if name != "request"
    ]


def test_the_readme_links_the_page():
    assert "](docs/services.md)" in (ROOT / "README.md").read_text()
