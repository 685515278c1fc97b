"""Several authorizers with the same answers, behind one address and by their own."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Self

from fastapi_topaz import AuthorizerOptions
from fastapi_topaz.testing import EmbeddedAuthorizer

from .proxy import Proxy


if TYPE_CHECKING:
    from collections import Counter


class Replicas:
    """
    *count* embedded authorizers, and a `Proxy` in front of them.

    They share one mapping of policies: a change for one replica is a change for all. A
    replica can fail by its own means, as in `replicas[0].fail("UNAVAILABLE")`, or on
    the way to it with `replicas.proxy.freeze(replicas[0].port)`.
    """

    def __init__(self, count: int, *, policies=None) -> None:
        self._authorizers = [EmbeddedAuthorizer(policies) for _ in range(count)]
        for authorizer in self._authorizers:
            # Bypass the setter, which copies.
            authorizer._service.policies = self._authorizers[0].policies
        self.proxy = Proxy([])
        self._running = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as starting:
            for authorizer in self._authorizers:
                starting.enter_context(authorizer)
            self.proxy.backends = [authorizer.port for authorizer in self._authorizers]
            starting.enter_context(self.proxy)
            self._running = starting.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def __getitem__(self, index: int) -> EmbeddedAuthorizer:
        return self._authorizers[index]

    @property
    def options(self) -> AuthorizerOptions:
        """For clients that know only the address of the proxy."""
        return AuthorizerOptions(url=self.proxy.url, insecure=True)

    @property
    def target(self) -> str:
        """The replicas' own addresses, as a name that gRPC can resolve."""
        return "ipv4:" + ",".join(authorizer.url for authorizer in self._authorizers)

    @property
    def addressed_options(self) -> AuthorizerOptions:
        """For clients that know the addresses of all replicas."""
        return AuthorizerOptions(url=self.target, insecure=True)

    def serving(self) -> set[int]:
        """The replicas that have a connection now."""
        return {i for i, one in enumerate(self._authorizers) if one.connections_open}

    def calls(self, index: int) -> Counter[str]:
        """How often each method of a replica was called."""
        return self[index].calls

    def restart(self, index: int, grace: float = 0.0) -> None:
        """Stop a replica, and start it on the same port."""
        self[index].stop(grace)
        self[index].start()
