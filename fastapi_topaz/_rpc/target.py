"""The target of a gRPC connection: address, metadata, credentials and probe."""

from __future__ import annotations

import os
import re

import attrs

from fastapi_topaz._checks import check_flag, check_text, safe_repr
from fastapi_topaz._redaction import guarded
from fastapi_topaz._rpc.metadata import Metadata, check_metadata


__all__ = ["Target"]


_METHOD = re.compile(r"/([A-Za-z_][\w.]*)/[A-Za-z_]\w*", re.ASCII)


@guarded
@attrs.frozen(kw_only=True)
class Target:
    """
    The address of a gRPC server, and how a `GrpcConnector` connects to it.

    Args:
        url: A target of gRPC, such as `host:port`, `[IPv6]:port`, `dns:///host:port`
            or `unix:/path`. Include the port. Without it, gRPC uses 443.
        metadata: Pairs that are sent with every call, default none. They may be
            secret, so no repr shows them.
        cert_file_path: A PEM file with the CA that signed the server's certificate.
            None, the default, means the root certificates that gRPC ships. The file
            is read at every connect, so new connections use a rotated file.
        insecure: True means plaintext, without TLS. Default False.
        probe: The full name of a unary-unary call, as `/package.Service/Method`. The
            pool sends it with an empty request to check that the server is alive. Any
            answer of the server with a `grpc-status` proves that. The default is
            `/grpc.health.v1.Health/Check`, the standard health check.
        unserved: The end of the error message if the server answers the first probe
            of a connection with UNIMPLEMENTED. The default names the service of
            *probe*.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: *url* is empty, *probe* is not a full name, a pair of *metadata*
            cannot be sent, or *cert_file_path* is given with *insecure*.
    """

    url: str
    metadata: Metadata = attrs.field(default=(), repr=False)
    cert_file_path: str | None = None
    insecure: bool = False
    probe: str = "/grpc.health.v1.Health/Check"
    unserved: str | None = None

    def __attrs_post_init__(self) -> None:
        check_text("url", self.url, optional=False)
        check_metadata(self.metadata)
        pairs = tuple((key, value) for key, value in self.metadata or ())
        object.__setattr__(self, "metadata", pairs)
        if isinstance(self.cert_file_path, os.PathLike):
            object.__setattr__(self, "cert_file_path", os.fspath(self.cert_file_path))
        check_text("cert_file_path", self.cert_file_path)
        check_flag("insecure", self.insecure)
        if self.insecure and self.cert_file_path is not None:
            raise ValueError(
                "cert_file_path and insecure=True exclude each other, got "
                f"cert_file_path={self.cert_file_path!r}"
            )
        check_text("probe", self.probe, optional=False)
        method = _METHOD.fullmatch(self.probe)
        if method is None:
            raise ValueError(
                "probe must be a full name such as '/package.Service/Method', got "
                f"{safe_repr(self.probe)}"
            )
        check_text("unserved", self.unserved)
        if self.unserved is None:
            object.__setattr__(self, "unserved", f"does not serve {method[1]}")
