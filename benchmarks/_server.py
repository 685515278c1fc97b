"""
Runs an authorizer in a separate process, so that its CPU time is not counted.

It is the embedded authorizer, which needs about 0.3 ms of one CPU for a check. So a
benchmark can reach at most about 3,000 checks per second.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys

from fastapi_topaz import AuthorizerOptions
from fastapi_topaz.testing import EmbeddedAuthorizer


POLICY = "myapp.GET.documents"
"""The path of a policy that allows every request."""

PATIENCE = 10.0
"""Time limit in seconds for the process to end."""


@contextlib.contextmanager
def authorizer(*, tls=False, latency=0.0, streams=None):
    """
    Start an authorizer, yield the options to connect to it, and stop it at the end.

    Args:
        tls: Whether to serve TLS, with a temporary CA. Default False.
        latency: Time for each answer, in seconds. Default 0.
        streams: Maximum number of open calls on a connection. None, the default,
            means no limit.
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
        # stdin closes when the parent process ends, for any reason. Then this ends too.
        sys.stdin.read()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--streams", type=int)
    serve(**vars(parser.parse_args()))
