"""
The parameters of a pool, and the checks of their types and values.

Options are built at import time, before a worker process forks. So nothing here uses
the network, a file or an event loop.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ParamSpec

import attrs

from fastapi_topaz._checks import (
    check_count,
    check_flag,
    check_seconds,
    check_text,
    safe_repr,
)


if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["PoolOptions", "fit_minimum"]


# The least values in seconds, if not 0. With a smaller one, the event loop or the
# server would do nothing else.
_LEAST = {
    "idle_check_interval": 0.001,
    "health_check_interval": 0.001,
    "max_lifetime": 1.0,
}

P = ParamSpec("P")


def fit_minimum(init: Callable[P, None]) -> Callable[P, None]:
    """
    Wrap *init* so that `min_connections` defaults to 1 if `max_connections` is 1.

    The signature of *init* keeps the documented default 2. If the caller passes 2
    explicitly, the two values contradict each other, and *init* refuses them. Only the
    arguments of the call show whether 2 was passed.
    """

    @functools.wraps(init)
    def fitting(*args: P.args, **kwargs: P.kwargs) -> None:
        if kwargs.get("max_connections") == 1:
            kwargs.setdefault("min_connections", 1)
        init(*args, **kwargs)

    return fitting


@attrs.frozen(kw_only=True)
class PoolOptions:
    """
    The parameters of a pool. `ConnectionPool` documents them and has their defaults.

    Strictly private.
    """

    min_connections: int
    max_connections: int
    acquire_timeout: float
    connection_timeout: float
    max_idle_time: float
    idle_check_interval: float
    health_check_interval: float
    health_check_timeout: float
    eager_init: bool
    retry_on_failure: bool
    max_retries: int
    streams_per_connection: int
    max_waiting: int | None
    max_lifetime: float
    leak_threshold: float
    adaptive_limit: bool
    name: str | None

    def __attrs_post_init__(self) -> None:
        check_count("min_connections", self.min_connections, 0)
        check_count("max_connections", self.max_connections, 1)
        if self.min_connections > self.max_connections:
            raise ValueError(
                f"min_connections must not exceed max_connections, got "
                f"min_connections={safe_repr(self.min_connections)} and "
                f"max_connections={safe_repr(self.max_connections)}"
            )
        check_count("max_retries", self.max_retries, 0)
        check_count("streams_per_connection", self.streams_per_connection, 1)
        if self.max_waiting is not None:
            check_count("max_waiting", self.max_waiting, 0)
        for name in (
            "acquire_timeout",
            "max_idle_time",
            "idle_check_interval",
            "health_check_interval",
            "max_lifetime",
            "leak_threshold",
        ):
            check_seconds(name, getattr(self, name))
        for name, least in _LEAST.items():
            if 0 < getattr(self, name) < least:
                raise ValueError(
                    f"{name} must be 0 (never) or at least {least:g} seconds, "
                    f"got {getattr(self, name)!r}"
                )
        for name in ("connection_timeout", "health_check_timeout"):
            check_seconds(name, getattr(self, name), zero=False, infinite=False)
        check_flag("eager_init", self.eager_init)
        check_flag("retry_on_failure", self.retry_on_failure)
        check_flag("adaptive_limit", self.adaptive_limit)
        check_text("name", self.name)

    @property
    def capacity(self) -> int:
        """The most leases that the pool gives out at once."""
        return self.max_connections * self.streams_per_connection

    @property
    def attempts(self) -> int:
        """The failed rounds of attempts to connect after which waiting callers fail."""
        return 1 + (self.max_retries if self.retry_on_failure else 0)
