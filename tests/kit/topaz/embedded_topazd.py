"""
The embedded authorizer behind the command line and the configuration of topazd.

It replaces the real topazd where that is not available. So code that starts, stops and
freezes topazd, and the tests that use it, run everywhere.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[2]))

from fastapi_topaz.testing import EmbeddedAuthorizer
from fastapi_topaz.testing._certs import Certificates
from kit.topaz.config import ROUTE_POLICIES
from kit.topaz.twins import ROUTE_TWINS, TWINS


def authorizer(config: dict[str, Any]) -> EmbeddedAuthorizer:
    """Return the authorizer that *config* describes, not started."""
    address = config["api"]["services"]["authorizer"]["grpc"]["listen_address"]
    certificate = config["api"]["services"]["authorizer"]["grpc"].get("certs")
    (bundle,) = config["opa"]["local_bundles"]["paths"]
    made = EmbeddedAuthorizer(
        ROUTE_TWINS if Path(bundle) == ROUTE_POLICIES else TWINS,
        port=int(address.rpartition(":")[2]),
        tls=certificate is not None,
        api_key=next(iter(config["auth"]["api_keys"]), None),
        identities=(),
    )
    if certificate is not None:
        # The test process would not know a certificate that this process makes itself.
        made._certificates = Certificates(
            certificate["tls_ca_cert_path"],
            Path(certificate["tls_key_path"]).read_bytes(),
            Path(certificate["tls_cert_path"]).read_bytes(),
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="topazd")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("version")
    run = commands.add_parser("run")
    run.add_argument("--config-file", "-c", required=True, type=Path)
    arguments = parser.parse_args()
    if arguments.command == "version":
        print("topazd embedded")  # noqa: T201
        return
    ends = {signal.SIGTERM, signal.SIGINT}
    # Before other threads exist, because one of them could get the signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    with authorizer(json.loads(arguments.config_file.read_text())) as running:
        signal.sigwait(ends)
        running.stop(grace=5)


if __name__ == "__main__":
    main()
