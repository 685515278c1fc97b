"""
What the status page shows: a snapshot of the pools and the decisions, ready for JSON.

To show more, add a function to `SECTIONS`. The page makes a table of whatever it
returns. `docs/status-page.md` documents each member.
"""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, Final

import attrs

from fastapi_topaz._error_text import shortened
from fastapi_topaz._telemetry.decisions import OUTCOMES
from fastapi_topaz._version import VERSION


if TYPE_CHECKING:
    from fastapi_topaz._app.config import TopazConfig
    from fastapi_topaz._authorizer.pool import ConnectionPool


__all__ = ["SCHEMA", "SECTIONS", "plain", "snapshot"]


SCHEMA: Final = 1
"""Changes if a member is removed or gets another meaning. A new one changes nothing."""

LONGEST = 500
"""The most characters of a text."""

# The part of a URL with a user and a password, and the first part of a mail address.
_BEFORE_AT = re.compile(r"(?<=://)\S*@|[^\s/]+@")


def _outcomes(config: TopazConfig) -> object:
    sources = config._metrics.counts.sources  # noqa: SLF001
    return [
        {"source": source, **{name: getattr(counts, name) for name in OUTCOMES}}
        for source, counts in sources.items()
    ]


def _cache(config: TopazConfig) -> object:
    return None if config.decision_cache is None else config.decision_cache.status()


def _breaker(config: TopazConfig) -> object:
    return None if config.circuit_breaker is None else config.circuit_breaker.status()


def _fallbacks(config: TopazConfig) -> object:
    uses = config._metrics.counts.fallbacks.copy()  # noqa: SLF001
    return [
        {"strategy": name, "older_answer": older, "decision": decision, "count": count}
        for (name, older, decision), count in sorted(uses.items())
    ]


SECTIONS: Final[dict[str, Callable[[TopazConfig], object]]] = {
    "outcomes": _outcomes,
    "cache": _cache,
    "breaker": _breaker,
    "fallbacks": _fallbacks,
}
"""
The sections about decisions, by their names in the snapshot.

Each returns None if the layer is not configured, an object with fields, or a list of
objects with equal fields.
"""


def snapshot(config: TopazConfig, pools: Sequence[ConnectionPool]) -> dict[str, Any]:
    """Return the numbers of *config*, its pool and further *pools* of this process."""
    shown = [config.connection_pool, *pools]
    return {
        "schema": SCHEMA,
        "time": time.time(),
        "process": {
            "pid": os.getpid(),
            "host": plain(socket.gethostname()),
            "version": VERSION,
        },
        "pools": [_pool(pool) for pool in shown],
        "decisions": {name: plain(of(config)) for name, of in SECTIONS.items()},
    }


def _pool(pool: ConnectionPool) -> dict[str, Any]:
    # Strictly private, but never read by requests: the page is part of this package.
    open_pool, counters = pool._open_pool, pool._counters  # noqa: SLF001
    options = pool.authorizer_options
    target = None if options is None else options.url
    if open_pool is not None:
        target = open_pool.target
    shown = {
        "name": pool.options.name,
        "target": target,
        "phase": pool._phase(),  # noqa: SLF001
        "status": pool.status(),
        "capacity": pool.options.capacity,
        "counters": counters,
        "connections": pool.connections(),
        "events": pool._events.recent(),  # noqa: SLF001
    }
    return {name: plain(value) for name, value in shown.items()}


def plain(value: object) -> Any:
    """
    Return *value* as JSON has it, without what a page must not show.

    Texts may come from a server, a certificate or a connector. So what stands before an
    @ is hidden: it may be a password in a URL, or a person. Characters that cannot be
    seen, such as those that turn the direction of text around, are replaced. JSON has
    no infinite number, so that is None.
    """
    match value:
        case str():
            return _text(value)
        case None | bool() | int() | float():
            return None if isinstance(value, float) and not isfinite(value) else value
        case Mapping():
            # Copied at once, because another thread may count.
            return {_text(str(key)): plain(item) for key, item in dict(value).items()}
        case list() | tuple():
            return [plain(item) for item in value]
    if names := _fields(type(value)):
        return {name: plain(getattr(value, name)) for name in names}
    # Not its repr(): that may have a secret in it.
    return f"a {type(value).__name__}"


def _fields(kind: type) -> list[str]:
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)]
    return [field.name for field in attrs.fields(kind)] if attrs.has(kind) else []


def _text(text: str) -> str:
    # Shortened first: on a long text, the search would take too long.
    hidden = _BEFORE_AT.sub("***@", shortened(text, LONGEST))
    return "".join(
        sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in hidden
    )
