"""A server on gRPC's C core, whose answers a function of the test makes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

import grpc


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Answer = Callable[[str, bytes, grpc.ServicerContext], bytes]


class CCoreServer:
    """
    A server of any method, in threads of this process. Use it in a `with`.

    Args:
        answer: Called with the method, the request and the context of each call.
            Returns the response, or ends the call by the context.
        options: Arguments of gRPC's core, such as `grpc.max_connection_age_ms`.
    """

    def __init__(
        self, answer: Answer, options: Mapping[str, int | str] | None = None
    ) -> None:
        self._threads = ThreadPoolExecutor(32)
        self._server = grpc.server(
            self._threads,
            handlers=[_AnyMethod(answer)],
            options=[*(options or {}).items()],
        )
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self.url = f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()
        self._threads.shutdown()


class _AnyMethod(grpc.GenericRpcHandler):
    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self._answer(call.method, request, context)
        )
