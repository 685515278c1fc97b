"""
Test the pool against a server process: Topaz itself, if it is installed.

Otherwise the embedded authorizer runs as that process.
"""

from __future__ import annotations

import json
import pathlib
import sys
import time
from collections import Counter

import anyio
import attrs
import grpc
import pytest
from anyio.to_thread import run_sync

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectFailed,
    ConnectionPool,
    Identity,
    IdentityType,
    TopazConfig,
)
from fastapi_topaz.testing._certs import Certificates
from kit.configs import Requests
from kit.topaz.config import Config
from kit.topaz.server import EMBEDDED, REAL, Topazd, TopazdError, free_port
from kit.waiting import eventually


pytestmark = pytest.mark.real_clock

ALLOW = "conformance.allow"
USERS = 200 if REAL else 40
KEY = "0123456789abcdef"


@pytest.fixture(scope="module", params=["embedded", *(["topaz"] if REAL else [])])
def command(request):
    return [REAL] if request.param == "topaz" else EMBEDDED


@pytest.fixture(scope="module")
def servers(command, tmp_path_factory):
    """Two servers that do not run: plaintext without a key, and TLS with a key."""
    with (
        Topazd(command, tmp_path_factory.mktemp("plain")) as plain,
        Topazd(
            command, tmp_path_factory.mktemp("locked"), tls=True, api_key=KEY
        ) as locked,
    ):
        yield plain, locked


@pytest.fixture
def plain(servers):
    yield servers[0].start()
    print(servers[0].log)  # noqa: T201  (shown with a failure)


@pytest.fixture
def locked(servers):
    yield servers[1].start()
    print(servers[1].log)  # noqa: T201  (shown with a failure)


def pooled(options, **settings):
    pool = ConnectionPool(**{"min_connections": 0} | settings)
    pool.configure(options)
    return pool


async def ask(pool, path=ALLOW, **question):
    async with pool.acquire() as conn:
        return await conn.decisions(policy_path=path, **question)


# -- the process ----------------------------------------------------------------------


def test_the_server_returns_its_version(plain):
    assert plain.version().startswith("topazd ")


def test_the_server_starts_and_stops_once_and_keeps_its_port(command, tmp_path):
    with Topazd(command, tmp_path) as server:
        server.stop()
        port = server.start().port
        assert server.start().port == port
        server.stop()
        server.kill()
        begin, end = server.outages[0]
        assert begin <= end


def test_the_output_of_a_server_that_does_not_start_is_reported(command, tmp_path):
    with Topazd(command, tmp_path) as server:
        server.config_file = tmp_path / "nowhere.yaml"
        with pytest.raises(TopazdError, match="exited with 1") as caught:
            server.start()
    assert "nowhere.yaml" in str(caught.value)


def test_a_server_that_never_answers_is_reported_and_killed(tmp_path):
    idle = [sys.executable, "-c", "import signal; signal.pause()"]
    with Topazd(idle, tmp_path, patience=0) as server:
        with pytest.raises(TopazdError, match="does not answer: Deadline Exceeded"):
            server.start()
        assert server._process is None


def test_a_server_that_does_not_stop_is_reported_and_killed(command, tmp_path):
    with Topazd(command, tmp_path) as server:
        process = server.start()._process
        server.freeze()
        server.patience = 0.05
        with pytest.raises(TopazdError, match="did not end on SIGTERM"):
            server.stop()
        assert process.poll() is not None


def test_a_configuration_that_topaz_would_misread_is_rejected(tmp_path):
    config = Config(port=1, gateway_port=2, policies=pathlib.Path("it's"))
    with pytest.raises(ValueError, match="something else"):
        config.write(tmp_path / "config.yaml")


def test_the_configuration_is_yaml_after_the_substitutions_of_topaz(tmp_path):
    yaml = pytest.importorskip("yaml")
    config = Config(port=1, gateway_port=2, api_key=KEY)
    text = config.write(tmp_path / "config.yaml").read_text()
    assert yaml.safe_load(text.replace('"', "'")) == json.loads(text)


# -- authentication and TLS -----------------------------------------------------------


async def test_tls_and_the_api_key_are_accepted(locked):
    async with pooled(locked.options) as pool:
        assert await ask(pool) == {"allowed": True}


@pytest.mark.parametrize("key", [None, "wrong"])
async def test_a_wrong_api_key_is_unauthenticated_and_the_connection_stays(locked, key):
    options = attrs.evolve(locked.options, api_key=key)
    async with pooled(options, max_connections=1, health_check_interval=0.05) as pool:
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(pool)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        async with pool.acquire() as conn:
            assert (await conn.info()).version
        assert pool.status().healthy
        assert not pool._counters.closes


async def test_the_certificate_is_verified(locked):
    other = Certificates.issue()
    for options in (
        attrs.evolve(locked.options, cert_file_path=other.ca_path),
        attrs.evolve(locked.options, cert_file_path=None, insecure=True),
    ):
        async with pooled(options, max_retries=0) as pool:
            with pytest.raises(ConnectFailed):
                await ask(pool)


async def test_a_tls_connect_to_a_plaintext_server_fails(plain, locked):
    options = attrs.evolve(locked.options, url=plain.options.url)
    async with pooled(options, max_retries=0) as pool:
        with pytest.raises(ConnectFailed):
            await ask(pool)


# -- restarts -------------------------------------------------------------------------


class Traffic:
    """Users who make one check after another."""

    def __init__(self, config):
        self._config = config
        self.answered = 0
        self.failures = []
        self.stopped = False

    async def user(self, name):
        request = Requests(
            {"type": "http", "method": "GET", "path": "/", "headers": []}
            | {"path_params": {}}
        )
        while not self.stopped:
            begin = time.monotonic()
            try:
                assert await self._config.is_allowed(request, ALLOW)
            except Exception as error:  # noqa: BLE001  (kept, whatever it is)
                self.failures.append((begin, time.monotonic(), name, error))
                # The starting server needs the processor too.
                await anyio.sleep(0.1)
            else:
                self.answered += 1

    async def flows(self):
        """Wait until as many more checks are answered as there are users."""
        goal = self.answered + USERS
        await eventually(lambda: self.answered >= goal, timeout=60)


@pytest.mark.parametrize(
    "anyio_backend, end",
    [
        ("asyncio", "stop"),
        ("trio", "kill"),
        *([("asyncio", "kill"), ("trio", "stop")] if REAL else []),
    ],
    indirect=["anyio_backend"],
)
async def test_checks_survive_a_restart_and_fail_only_while_the_port_is_closed(
    plain, anyio_backend, end
):
    pool = pooled(
        plain.options,
        max_connections=20,
        streams_per_connection=10,
        acquire_timeout=30,
    )
    config = TopazConfig(
        authorizer_options=plain.options,
        policy_path_root="conformance",
        identity_provider=lambda _request: Identity(IdentityType.NONE),
        connection_pool=pool,
        check_timeout=30,
    )
    traffic = Traffic(config)
    async with pool, anyio.create_task_group() as tasks:
        for name in range(USERS):
            tasks.start_soon(traffic.user, name)
        await traffic.flows()
        assert traffic.failures == []
        await run_sync(getattr(plain, end))
        await run_sync(plain.start)
        await traffic.flows()
        traffic.stopped = True
    closed, open_again = plain.outages[-1]
    for _, finish, _, error in traffic.failures:
        assert finish >= closed, f"failed before the restart: {error!r}"
    # A caller that comes after the restart may still wait for an attempt that was
    # refused before it. That ends its check, but none of its next ones.
    late = Counter(user for begin, _, user, _ in traffic.failures if begin > open_again)
    assert late.total() == len(late), f"failed again after the restart: {late}"


@pytest.mark.parametrize(
    "anyio_backend", ["trio", *(["asyncio"] if REAL else [])], indirect=True
)
async def test_a_frozen_server_is_detected_and_recovers(plain, anyio_backend):
    async with pooled(
        plain.options,
        max_connections=1,
        health_check_interval=0.1,
        health_check_timeout=0.3,
    ) as pool:
        assert await ask(pool) == {"allowed": True}
        plain.freeze()
        try:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(pool, timeout=0.1)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await eventually(lambda: pool._counters.closes.get("unhealthy"))
        finally:
            plain.thaw()

        async def answers():
            try:
                return await ask(pool, timeout=5)
            except Exception:  # noqa: BLE001  (not yet)
                return None

        with anyio.fail_after(30):
            # Only a call shows this. There is no event to wait for.
            while await answers() != {"allowed": True}:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        assert pool.status().healthy


# -- cost -----------------------------------------------------------------------------


def test_free_ports_are_different():
    with free_port() as one, free_port() as two:
        assert one.getsockname() != two.getsockname()


def test_the_options_point_to_the_server(servers):
    plain, locked = servers
    assert plain.options == AuthorizerOptions(
        url=f"127.0.0.1:{plain.port}", insecure=True
    )
    assert locked.options.api_key == KEY
    assert not locked.options.insecure
