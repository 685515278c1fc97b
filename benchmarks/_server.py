"""
Runs an authorizer in a separate process, so that its CPU time is not counted.

It is the embedded authorizer, which needs about 0.3 ms of one CPU for a check. So a
benchmark can reach at most about 3,000 checks per second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fastapi_topaz import AuthorizerOptions
from fastapi_topaz.testing import EmbeddedAuthorizer


sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


POLICY = "myapp.GET.documents"
"""The path of a policy that allows every request."""

PATIENCE = 10.0
"""Time limit in seconds for the process to end."""


@contextlib.contextmanager
def authorizer(**options):
    """Start an authorizer as `counted` does, and yield only the options."""
    with counted(**options) as (connect_to, _calls):
        yield connect_to


@contextlib.contextmanager
def counted(*, tls=False, latency=0.0, streams=None, workers=None):
    """
    Start an authorizer, and stop it at the end.

    This yields the options to connect to it, and a function that returns how often it
    was asked for a decision.

    Args:
        tls: Whether to serve TLS, with a temporary CA. Default False.
        latency: Time for each answer, in seconds. Default 0.
        streams: Maximum number of open calls on a connection. None, the default,
            means no limit.
        workers: The number of calls that it works on at once. The others wait in the
            server. None, the default, means all.
    """
    command = [sys.executable, __file__, f"--latency={latency}"]
    command += ["--tls"] if tls else []
    command += [] if streams is None else [f"--streams={streams}"]
    command += [] if workers is None else [f"--workers={workers}"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            url, _, ca_path = process.stdout.readline().strip().partition(" ")
            if not url:
                raise RuntimeError("the authorizer did not start")

            def calls():
                process.stdin.write("calls?\n")
                process.stdin.flush()
                return int(process.stdout.readline())

            yield (
                AuthorizerOptions(
                    url=url, cert_file_path=ca_path or None, insecure=not tls
                ),
                calls,
            )
        finally:
            process.stdin.close()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()


SERVERS = {"embedded": None, "gopeer": "GOPEER", "topazd": "TOPAZD"}
"""Maps each server to the environment variable that names its binary, if it has one."""


@contextlib.contextmanager
def serving(server, *, tls=False, policies=None):
    """
    Start one of `SERVERS`, and yield its options and a policy that allows.

    Args:
        server: The name of the server.
        tls: Whether it serves TLS. Default False.
        policies: Maps names to the text of policies in Rego, for topazd. They include
            `POLICY`. None, the default, means those of the tests.
    """
    if server == "embedded":
        with authorizer(tls=tls) as options:
            yield options, POLICY
        return
    with tempfile.TemporaryDirectory() as folder:
        if server == "gopeer":
            yield from _gopeer(Path(folder), tls=tls)
        else:
            from kit.topaz.config import POLICIES  # noqa: PLC0415
            from kit.topaz.server import Topazd  # noqa: PLC0415

            if policies is None:
                policy, bundle = "conformance.allow", POLICIES
            else:
                policy, bundle = POLICY, Path(folder) / "policies"
                bundle.mkdir()
                for name, text in policies.items():
                    (bundle / f"{name}.rego").write_text(text)
            with Topazd(
                [os.environ["TOPAZD"]], Path(folder), tls=tls, policies=bundle
            ) as topazd:
                yield topazd.start().options, policy


def _gopeer(folder, *, tls):
    from fastapi_topaz.testing._certs import Certificates  # noqa: PLC0415
    from kit.gopeer.process import Gopeer  # noqa: PLC0415

    if not tls:
        with Gopeer() as peer:
            yield peer.options, POLICY
        return
    issued = Certificates.issue()
    key, chain = folder / "key.pem", folder / "chain.pem"
    key.write_bytes(issued.private_key)
    chain.write_bytes(issued.chain)
    with Gopeer(tls_key=key, tls_cert=chain) as peer:
        yield AuthorizerOptions(url=peer.url, cert_file_path=issued.ca_path), POLICY


def busy_policy(latency, workers):
    """Return a policy that needs one of *workers* for each answer."""
    free = asyncio.Semaphore(workers)

    async def decide(_check):
        async with free:
            await asyncio.sleep(latency)
        return True

    return decide


def serve(*, tls, latency, streams, workers):
    policy = True if workers is None else busy_policy(latency, workers)
    embedded = EmbeddedAuthorizer(
        {POLICY: policy}, tls=tls, max_concurrent_streams=streams
    )
    embedded.delay = latency if workers is None else 0.0
    with embedded:
        print(embedded.url, embedded.ca_cert_path or "", flush=True)
        # stdin closes when the parent process ends, for any reason. Then this ends too.
        for _question in sys.stdin:
            print(embedded.calls["Is"], flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--streams", type=int)
    parser.add_argument("--workers", type=int)
    serve(**vars(parser.parse_args()))
