"""The target of a gRPC connection: address, metadata, credentials and probe."""

from __future__ import annotations

import os
import re
from typing import Final

import attrs

from fastapi_topaz._checks import check_count, check_flag, check_text, safe_repr
from fastapi_topaz._redaction import guarded
from fastapi_topaz._rpc.metadata import Credentials, Metadata, frozen_metadata
from fastapi_topaz._rpc.names import check_authority, check_server_name


__all__ = ["MAX_MESSAGE_BYTES", "PATHS", "Target"]


MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
"""The default of `max_message_bytes`, which is that of gRPC for responses."""

_MOST_BYTES: Final = 2**30

PATHS: Final = ("cert_file_path", "client_cert_path", "client_key_path")
"""The options that are paths of files, each a str or an `os.PathLike`."""

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
            None, the default, means the root certificates of the system, or of gRPC
            with the transport `grpcio`. The file is read at every connect, so new
            connections use a rotated file.
        insecure: True means plaintext, without TLS. Default False.
        probe: The full name of a unary-unary call, as `/package.Service/Method`. The
            pool sends it with an empty request to check that the server is alive. Any
            answer of the server with a `grpc-status` proves that. The default is
            `/grpc.health.v1.Health/Check`, the standard health check.
        unserved: The end of the error message if the server answers the first probe
            of a connection with UNIMPLEMENTED. The default names the service of
            *probe*.
        client_cert_path: A PEM file with the certificate of this client (mutual TLS),
            and the certificates of CAs that the server needs above it. Default None:
            no client certificate. It is read at every connect.
        client_key_path: A PEM file with the private key of that certificate, which must
            not be encrypted. Given if and only if *client_cert_path* is.
        authority: The `:authority` of requests, as `host` or `host:port`. None, the
            default, means *server_name* if that is given, otherwise host and port of
            *url*. It does not change which name the certificate must be for.
        server_name: The host name or IP address that the server's certificate must be
            for. A host name is also sent in the TLS handshake (SNI). None, the default,
            means the host of *url*.
        credentials: A function or coroutine function without arguments. The transport
            calls it for every call and every probe, and also sends the metadata that it
            returns. So keys can change while a pool is open. It runs in the task that
            makes the call, and counts within the timeout of the call. It must not
            block. If it fails, the call fails with `CredentialsFailed`. Default None.
        max_message_bytes: The most bytes of one request or response, from 1 to 2**30.
            Default 4 MiB. A call with a larger message ends with RESOURCE_EXHAUSTED. A
            larger request is not sent.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: *url* is empty, *probe* is not a full name, a pair of *metadata*
            cannot be sent, *authority*, *server_name* or *max_message_bytes* is
            invalid, only one of *client_cert_path* and *client_key_path* is given, or
            an option of TLS is given with *insecure*.
    """

    url: str
    metadata: Metadata = attrs.field(default=(), repr=False)
    cert_file_path: str | None = None
    insecure: bool = False
    probe: str = "/grpc.health.v1.Health/Check"
    unserved: str | None = None
    client_cert_path: str | None = None
    client_key_path: str | None = None
    authority: str | None = None
    server_name: str | None = None
    # A repr may show a key, as that of a partial() does. It may not be hashable.
    credentials: Credentials | None = attrs.field(default=None, repr=False, hash=False)
    max_message_bytes: int = MAX_MESSAGE_BYTES

    def __attrs_post_init__(self) -> None:
        check_text("url", self.url, optional=False)
        object.__setattr__(self, "metadata", frozen_metadata(self.metadata))
        if self.credentials is not None and not callable(self.credentials):
            given = type(self.credentials).__name__
            raise TypeError(f"credentials must be callable, got a {given}")
        self._check_tls()
        check_authority(self.authority)
        check_count("max_message_bytes", self.max_message_bytes, 1)
        if self.max_message_bytes > _MOST_BYTES:
            raise ValueError(
                f"max_message_bytes must be at most 2**30, got {self.max_message_bytes}"
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

    def _check_tls(self) -> None:
        for name in PATHS:
            if isinstance(path := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(path))
            check_text(name, getattr(self, name))
        check_server_name(self.server_name)
        check_flag("insecure", self.insecure)
        if (self.client_cert_path is None) != (self.client_key_path is None):
            raise ValueError(
                "client_cert_path and client_key_path must be given together, got "
                f"client_cert_path={self.client_cert_path!r} and "
                f"client_key_path={self.client_key_path!r}"
            )
        for name in (*PATHS, "server_name"):
            if self.insecure and (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name} and insecure=True exclude each other, got {name}={value!r}"
                )
