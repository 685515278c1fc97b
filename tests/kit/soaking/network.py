"""The servers of a soak, and the faults on the way to them."""

from __future__ import annotations

import contextlib
import functools
import random
import socket
import threading

from fastapi_topaz.testing import EmbeddedAuthorizer
from kit.faultkit.proxy import Proxy


def is_even(check):
    """
    Allow even numbers. The request contains its answer, so a mixed-up answer shows.
    """
    return int(check.resource["number"]) % 2 == 0


class Network:
    """
    Some authorizers, each behind its own proxy, and one proxy in front of all.

    A thread breaks and repairs them by *seed*, until `heal`.
    """

    def __init__(self, seed, count=2):
        self._random = random.Random(seed)
        self._count = count
        self._stop = threading.Event()
        self.faults = 0

    def __enter__(self):
        self._stack = stack = contextlib.ExitStack()
        self.authorizers = [
            # Not 0: after a restart, it must get the same port.
            stack.enter_context(EmbeddedAuthorizer(is_even, port=_a_port()))
            for _ in range(self._count)
        ]
        ports = [authorizer.port for authorizer in self.authorizers]
        self.proxies = [stack.enter_context(Proxy(ports))]
        self.proxies += [stack.enter_context(Proxy([port])) for port in ports]
        self._thread = threading.Thread(target=self._break, name="soak faults")
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.heal()
        self._stack.close()

    @property
    def urls(self):
        return [proxy.url for proxy in self.proxies]

    @property
    def open(self):
        """Client sockets, at the proxies and at the servers."""
        at_servers = sum(one.connections_open for one in self.authorizers)
        return sum(proxy.open for proxy in self.proxies) + at_servers

    def heal(self):
        """End all faults, permanently."""
        self._stop.set()
        self._thread.join()

    def _break(self):
        while not self._stop.wait(self._random.expovariate(4)):
            self._one_fault()
        self._mend()

    def _one_fault(self):
        proxy = self._random.choice(self.proxies)
        server = self._random.choice(self.authorizers)
        fault = self._random.choice(
            [
                functools.partial(proxy.delay, self._random.uniform(0.001, 0.2)),
                functools.partial(proxy.slow_handshake, self._random.uniform(0.1, 1)),
                functools.partial(
                    proxy.reset_mid_response, self._random.randrange(2000)
                ),
                functools.partial(
                    proxy.truncate_mid_response, self._random.randrange(2000)
                ),
                functools.partial(proxy.cut, self._random.randint(1, 5)),
                proxy.cut,
                proxy.half_open,
                proxy.freeze,
                proxy.hang,
                proxy.refuse,
                functools.partial(server.fail, "UNAVAILABLE"),
                functools.partial(server.fail, "RESOURCE_EXHAUSTED", times=5),
                functools.partial(setattr, server, "delay", 0.2),
                functools.partial(server.drop_connections, 2),
                server.freeze,
                functools.partial(self._restart, server, 0.0),
                functools.partial(self._restart, server, 0.3),
            ]
        )
        fault()
        self.faults += 1
        if self._random.random() < 0.6:  # otherwise the next fault is added on top
            self._stop.wait(self._random.uniform(0.05, 1.5))
            self._mend()

    def _restart(self, server, grace):
        server.stop(grace)
        self._stop.wait(self._random.uniform(0, 1))
        server.start()

    def _mend(self):
        for server in self.authorizers:
            server.heal()
        for proxy in self.proxies:
            proxy.heal()
            proxy.listen()


def _a_port():
    # Below the ports that the system assigns to processes that ask for any.
    while True:
        port = random.randrange(13_000, 31_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
