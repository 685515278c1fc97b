"""A gRPC service with a stub as protoc's gRPC plugin generates it, and its server."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
from google.protobuf.wrappers_pb2 import Int64Value, StringValue


SERVICE = "/greeter.v1.Greeter"


class GreeterStub:
    """As generated from a .proto file; the messages are well-known types."""

    def __init__(self, channel):
        self.SayHello = channel.unary_unary(
            "/greeter.v1.Greeter/SayHello",
            request_serializer=StringValue.SerializeToString,
            response_deserializer=StringValue.FromString,
            _registered_method=True,
        )
        self.Count = channel.unary_unary(
            "/greeter.v1.Greeter/Count",
            request_serializer=StringValue.SerializeToString,
            response_deserializer=Int64Value.FromString,
            _registered_method=True,
        )
        self.ListHellos = channel.unary_stream(
            "/greeter.v1.Greeter/ListHellos",
            request_serializer=StringValue.SerializeToString,
            response_deserializer=StringValue.FromString,
            _registered_method=True,
        )
        self.CollectNames = channel.stream_unary(
            "/greeter.v1.Greeter/CollectNames",
            request_serializer=StringValue.SerializeToString,
            response_deserializer=StringValue.FromString,
            _registered_method=True,
        )
        self.Chat = channel.stream_stream(
            "/greeter.v1.Greeter/Chat",
            request_serializer=StringValue.SerializeToString,
            response_deserializer=StringValue.FromString,
            _registered_method=True,
        )


class Greeter(grpc.GenericRpcHandler):
    """
    Greets a name; some names have another effect.

    Attributes:
        asked: For each call, the name, the metadata and the seconds left.
        peers: The addresses of the clients that made calls.
        certificates: The certificates of these clients, in PEM format.
        go_on: Once set, the calls with the name "slow" end.
    """

    def __init__(self):
        self.asked = []
        self.peers = set()
        self.certificates = set()
        self.go_on = threading.Event()

    def service(self, details):
        methods = {
            f"{SERVICE}/SayHello": self.say_hello,
            f"{SERVICE}/Count": self.count,
            "/grpc.health.v1.Health/Check": lambda _request, _context: b"\x08\x01",
        }
        return grpc.unary_unary_rpc_method_handler(methods[details.method])

    def say_hello(self, request, context):
        name = self._name(request, context)
        if name == "stranger":
            context.abort(grpc.StatusCode.NOT_FOUND, "stranger is not here")
        if name == "slow":
            self.go_on.wait(50)
        if name == "garbage":
            return b"\xff\xff\xff"
        return StringValue(value=f"Hello, {name}").SerializeToString()

    def count(self, request, context):
        return Int64Value(value=len(self._name(request, context))).SerializeToString()

    def _name(self, request, context):
        name = StringValue.FromString(request).value
        self.peers.add(context.peer())
        self.certificates.update(context.auth_context().get("x509_pem_cert", ()))
        metadata = dict(context.invocation_metadata())
        self.asked.append((name, metadata, context.time_remaining()))
        return name


@contextlib.contextmanager
def greeter_server(credentials=None):
    """
    Yield a running `Greeter` with its address as `url`.

    *credentials* are those of the server. None means plaintext.
    """
    greeter = Greeter()
    with ThreadPoolExecutor(8) as executor:
        server = grpc.server(executor, handlers=[greeter])
        if credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        greeter.url = f"127.0.0.1:{port}"
        server.start()
        try:
            yield greeter
        finally:
            greeter.go_on.set()
            server.stop(None).wait()
