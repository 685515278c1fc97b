"""Where a gRPC server is, and how to talk to it."""

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
    A gRPC server: where it is, and how a `GrpcConnector` talks to it.

    Args:
        url: A target of gRPC, such as `host:port`, `[IPv6]:port`, `dns:///host:port`
            or `unix:/path`. With its port: gRPC would take 443.
        metadata: Pairs that go with every call, default none. They may be secrets, so
            no repr shows them.
        cert_file_path: A PEM file with the CA that signed the server's certificate.
            None, the default, means the roots that gRPC ships. Read at every connect,
            so a rotated file is used by new connections.
        insecure: True for plaintext, without TLS. Default False.
        probe: The full name of a unary-unary call, as `/package.Service/Method`. The
            pool sends it with an empty request to learn whether the server is alive.
            Any answer with a `grpc-status` of the server proves that. The default is
            `/grpc.health.v1.Health/Check`, the standard health check.
        unserved: The end of the error for a server that answers the first probe of a
            connection with UNIMPLEMENTED. The default names the service of *probe*.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: *url* is empty, *probe* is no full name, a header cannot be sent,
            or *cert_file_path* and *insecure* contradict each other.
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
