"""The configuration of a Topaz server that a test starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs


POLICIES = Path(__file__).parent / "policies"
ROUTE_POLICIES = Path(__file__).parent / "route_policies"
"""What routes of an application may be allowed below public prefixes, and no others."""

# Nobody listens there: without a directory, nobody is known.
NO_DIRECTORY = "127.0.0.1:1"

# What the configuration that Topaz generates lets through without a key.
OPEN_TO_ALL = [
    "/aserto.authorizer.v2.Authorizer/Info",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
]


@attrs.frozen(kw_only=True)
class Certificate:
    """PEM files of a server, and of the CA that clients trust."""

    key: Path
    chain: Path
    authority: Path


@attrs.frozen(kw_only=True)
class Config:
    """
    An authorizer with a local bundle, and nothing else.

    Args:
        port: Where the authorizer listens, on 127.0.0.1.
        gateway_port: Where its REST gateway listens, which it does not do without.
        certificate: For TLS; None for plaintext.
        api_key: Small letters and digits: Topaz reads keys as names in its
            configuration, which know no case. None lets everybody in.
        policies: The folder of the bundle.
    """

    port: int
    gateway_port: int
    certificate: Certificate | None = None
    api_key: str | None = None
    policies: Path = POLICIES

    def document(self) -> dict[str, Any]:
        """Return version 2 of Topaz's format, with keys that all its releases know."""
        grpc: dict[str, Any] = {"listen_address": f"127.0.0.1:{self.port}"}
        if self.certificate is not None:
            grpc["certs"] = {
                "tls_key_path": str(self.certificate.key),
                "tls_cert_path": str(self.certificate.chain),
                "tls_ca_cert_path": str(self.certificate.authority),
            }
        gateway = {"listen_address": f"127.0.0.1:{self.gateway_port}", "http": True}
        return {
            "version": 2,
            "logging": {"prod": True, "log_level": "info"},
            "remote_directory": {"address": NO_DIRECTORY, "insecure": True},
            "auth": self._auth(),
            "api": {"services": {"authorizer": {"grpc": grpc, "gateway": gateway}}},
            "opa": {
                "instance_id": "-",
                "local_bundles": {
                    "paths": [str(self.policies)],
                    "skip_verification": True,
                },
            },
        }

    def _auth(self) -> dict[str, Any]:
        locked = self.api_key is not None
        default = {"enable_api_key": locked, "enable_anonymous": not locked}
        anybody = {"enable_api_key": False, "enable_anonymous": True}
        overrides = [{"paths": OPEN_TO_ALL, "override": anybody}]
        keys = {self.api_key: "tests"} if locked else {}
        return {
            "api_keys": keys,
            "options": {"default": default, "overrides": overrides},
        }

    def write(self, path: Path) -> Path:
        """Write it to *path*, as the JSON that is YAML as well."""
        text = json.dumps(self.document(), indent=2)
        # Topaz makes each double quote a single one before it reads the file, and
        # puts the environment in place of ${NAME}.
        if "'" in text or "\\" in text or "${" in text:
            raise ValueError(f"Topaz would read something else: {text}")
        path.write_text(text)
        return path
