"""How connections are made: gRPC to an authorizer, on asyncio and on trio."""

from fastapi_topaz._transport._base import Connection, Connector, RpcConnection, Verdict
from fastapi_topaz._transport._connector import GrpcConnector
from fastapi_topaz._transport._endings import is_reset, is_unprocessed


__all__ = [
    "Connection",
    "Connector",
    "GrpcConnector",
    "RpcConnection",
    "Verdict",
    "is_reset",
    "is_unprocessed",
]
