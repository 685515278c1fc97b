"""
An authorizer in a process of its own, so that what it costs is not counted.

It is the embedded one, which takes about 0.3 ms of one CPU for a check: it ends what a
benchmark may reach at some 3,000 checks per second.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys

from fastapi_topaz import AuthorizerOptions
from fastapi_topaz.testing import EmbeddedAuthorizer


POLICY = "myapp.GET.documents"
"""The policy that allows everybody."""

PATIENCE = 10.0
"""Seconds that the process gets to end, once it was asked to."""


@contextlib.contextmanager
def authorizer(*, tls=False, latency=0.0, streams=None):
    """
    Start one, return the options that lead to it, and stop it in the end.

    Args:
        tls: Whether it serves TLS, with a throw-away CA.
        latency: Seconds that each answer takes.
        streams: How many calls one connection may have open; None is unlimited.
    """
    command = [sys.executable, __file__, f"--latency={latency}"]
    command += ["--tls"] if tls else []
    command += [] if streams is None else [f"--streams={streams}"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            url, _, ca_path = process.stdout.readline().strip().partition(" ")
            if not url:
                raise RuntimeError("the authorizer did not start")
            yield AuthorizerOptions(
                url=url, cert_file_path=ca_path or None, insecure=not tls
            )
        finally:
            process.stdin.close()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()


def serve(*, tls, latency, streams):
    embedded = EmbeddedAuthorizer(
        {POLICY: True}, tls=tls, max_concurrent_streams=streams
    )
    embedded.delay = latency
    with embedded:
        print(embedded.url, embedded.ca_cert_path or "", flush=True)
        # It ends with whoever started it, however that ends.
        sys.stdin.read()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--streams", type=int)
    serve(**vars(parser.parse_args()))
