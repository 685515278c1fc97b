"""Answers of `Http2Server` that mean that a server behind a proxy is down."""

from __future__ import annotations

from .http2 import _HEADERS


def http(status, content_type="text/html", body=b""):
    """Answer with an HTTP error page, as a proxy does."""

    def answer(call):
        wire = call.connection.h2
        headers = [(":status", str(status)), ("content-type", content_type)]
        wire.send_headers(call.stream, headers, end_stream=not body)
        if body:
            wire.send_data(call.stream, body, end_stream=True)
        call.connection.forget(call.stream)

    return answer


def headers(text):
    """Answer UNAVAILABLE with trailers only."""
    return lambda call: call.fail(14, text)


def trailers(text):
    """Answer UNAVAILABLE with headers first."""

    def answer(call):
        call.connection.h2.send_headers(call.stream, _HEADERS)
        call._end([("grpc-status", "14"), ("grpc-message", text)])

    return answer
