"""Proxies, servers and clients of one test, closed at its end."""

from __future__ import annotations

import contextlib
import socket

from kit.faultkit.proxy import Proxy


HOURS = 10_000.0


class Net:
    """Makes sockets and proxies, and closes them after the test."""

    def __init__(self):
        self.made = contextlib.ExitStack()

    def backend(self, backlog=100):
        address = ("127.0.0.1", 0)
        listener = self.made.enter_context(
            socket.create_server(address, backlog=backlog)
        )
        listener.settimeout(10)
        return listener

    def proxy(self, *backends):
        return self.made.enter_context(Proxy([port_of(b) for b in backends]))

    def dial(self, proxy):
        address = ("127.0.0.1", proxy.port)
        return self.made.enter_context(socket.create_connection(address, timeout=10))

    def accept(self, backend):
        server = self.made.enter_context(backend.accept()[0])
        server.settimeout(10)
        return server

    def pair(self, proxy, backend):
        client = self.dial(proxy)
        return client, self.accept(backend)


def port_of(listener):
    return listener.getsockname()[1]


def is_reset(sock):
    """Return whether it ends with a RST, whatever bytes come before."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        return True
    return False
