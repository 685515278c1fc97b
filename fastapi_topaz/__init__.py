"""
A pool of gRPC connections to the Topaz authorizer for FastAPI, on asyncio and trio.

All public names are in this module and in `fastapi_topaz.testing`, which has an
embedded authorizer and fakes for tests. Modules with an underscore are private.
"""

from typing import TYPE_CHECKING, Any

from fastapi_topaz._distribution import refuse_mixture


# Before any other import, because those modules may belong to the other library.
refuse_mixture()

from fastapi_topaz._app.config import TopazConfig
from fastapi_topaz._authorizer.options import AuthorizerOptions, Identity, IdentityType
from fastapi_topaz._authorizer.pool import ConnectionPool, PooledConnection
from fastapi_topaz._decisions.breaker import CircuitBreaker, CircuitStatus
from fastapi_topaz._decisions.bus import BusStatus, InvalidationBus
from fastapi_topaz._decisions.cache import CacheStatus, DecisionCache
from fastapi_topaz._decisions.question import Decision
from fastapi_topaz._pool.connector import Connector, Verdict
from fastapi_topaz._pool.state.status import ConnectionStatus, PoolStatus
from fastapi_topaz._rpc.target import Target
from fastapi_topaz.connector import GrpcConnector
from fastapi_topaz.exceptions import (
    CircuitOpen,
    ConnectFailed,
    ConnectionLost,
    CredentialsFailed,
    PoolClosed,
    PoolError,
    PoolMisuse,
    PoolSaturated,
    PoolTimeout,
    TopazError,
)


if TYPE_CHECKING:
    from fastapi_topaz._app.guards import require_policy_allowed, require_policy_auto
    from fastapi_topaz._app.status_page import status_app


__all__ = [
    "AuthorizerOptions",
    "BusStatus",
    "CacheStatus",
    "CircuitBreaker",
    "CircuitOpen",
    "CircuitStatus",
    "ConnectFailed",
    "ConnectionLost",
    "ConnectionPool",
    "ConnectionStatus",
    "Connector",
    "CredentialsFailed",
    "Decision",
    "DecisionCache",
    "GrpcConnector",
    "Identity",
    "IdentityType",
    "InvalidationBus",
    "PoolClosed",
    "PoolError",
    "PoolMisuse",
    "PoolSaturated",
    "PoolStatus",
    "PoolTimeout",
    "PooledConnection",
    "Target",
    "TopazConfig",
    "TopazError",
    "Verdict",
    "require_policy_allowed",
    "require_policy_auto",
    "status_app",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # Imported on first use: FastAPI takes longer to import than the rest of this
    # package, and not every program uses it.
    if name in {"require_policy_allowed", "require_policy_auto"}:
        from fastapi_topaz._app import guards  # noqa: PLC0415

        return getattr(guards, name)
    if name == "status_app":
        from fastapi_topaz._app import status_page  # noqa: PLC0415

        return status_page.status_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
