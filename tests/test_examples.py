"""
The examples: each by the command that it names, in a process of its own.

They ask the embedded authorizer over a socket. The applications run in this process,
too, on both backends, where one can see that their pools are closed in the end.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import grpc
import httpx
import pytest
import yaml
from google.protobuf.wrappers_pb2 import Int64Value, StringValue
from topaz.server import MISSING, REAL, Topazd, free_port
from waiting import eventually

from fastapi_topaz import (
    ConnectFailed,
    ConnectionLost,
    ConnectionPool,
    Identity,
    IdentityType,
)
from fastapi_topaz._cli.demo import serving
from fastapi_topaz.testing import Check


pytestmark = pytest.mark.real_clock

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
COMPOSE = EXAMPLES / "compose"
POLICIES = COMPOSE / "topaz" / "policies"

USERS = {"alice", "bob"}
PEOPLE = ("alice", "bob", "mallory")
OWNERS = {"1": "alice", "2": "bob"}
APPLICATIONS = ["lifespan_app", "hooks_app", "explicit_acquire"]

asyncio_only = pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)


def is_user(check):
    return check.identity.value in USERS


def is_owner(check):
    return OWNERS.get(check.resource["id"]) == check.identity.value


def is_reader(check):
    return is_owner(check) or (check.resource["id"] == "1" and is_user(check))


# What those of examples/compose say. Another path is an error, and answered 503.
DECISIONS = {
    "myapp.GET.documents": is_user,
    "myapp.GET.documents.__id": is_reader,
    "myapp.DELETE.documents.__id": is_owner,
}


def asked(path, user, document):
    return Check(
        policy_path=path,
        decisions=("allowed",),
        identity=Identity(IdentityType.MANUAL, user),
        resource={"id": document},
    )


@pytest.fixture
def authorizer(embedded_authorizer):
    embedded_authorizer.policies = DECISIONS
    return embedded_authorizer


# -- as this process imports them -----------------------------------------------------


def load(name):
    path = EXAMPLES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name.replace(".", "_"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def served(name, backend, authorizer):
    """Serve the application of an example; see its pool opened and closed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOPAZ_URL", authorizer.url)
        module = load(name)
    pool = module.pool if name == "explicit_acquire" else module.config.connection_pool
    assert repr(pool).startswith("<ConnectionPool new")
    with (
        serving(module.app, backend) as url,
        httpx.Client(base_url=url, trust_env=False) as client,
    ):
        assert repr(pool).startswith("<ConnectionPool open")
        yield client
    assert repr(pool).startswith("<ConnectionPool closed")
    anyio.run(eventually, lambda: authorizer.connections_open == 0)


def statuses(client, path="/documents"):
    """Return what alice, mallory and nobody are answered."""
    headers = [{"x-user": "alice"}, {"x-user": "mallory"}, {}]
    return [client.get(path, headers=user).status_code for user in headers]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("name", APPLICATIONS)
def test_an_application_answers_and_closes_its_pool(name, backend, authorizer):
    with served(name, backend, authorizer) as client:
        assert statuses(client) == [200, 403, 403]
        assert client.get("/documents", headers={"x-user": "bob"}).json() == ["1", "2"]


def test_the_application_of_the_guide(authorizer):
    with served("lifespan_app", "asyncio", authorizer) as client:
        bob = {"x-user": "bob"}
        assert client.get("/documents/2", headers=bob).json() == {"id": "2"}
        assert statuses(client, "/documents/2") == [403, 403, 403]
        health = client.get("/health").json()
        assert health["status"] == "ok"
        assert health["connection_pool"]["max"] == 10
        assert health["connection_pool"]["total"] >= 1


def test_the_startup_hook_waits_for_the_first_connection(authorizer):
    with served("hooks_app", "asyncio", authorizer):
        assert authorizer.connections_open == 1


def test_a_lease_of_ones_own(authorizer):
    with served("explicit_acquire", "asyncio", authorizer) as client:
        alice, bob = {"x-user": "alice"}, {"x-user": "bob"}
        path = "/documents/1/rights"
        assert client.get(path, headers=alice).json() == {"read": True, "delete": True}
        assert client.get(path, headers=bob).json() == {"read": True, "delete": False}
        assert statuses(client, path) == [200, 403, 403]
        for path in ("/documents", "/documents/1/rights"):
            authorizer.fail("INTERNAL")
            answer = client.get(path, headers=alice)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            authorizer.heal()
            assert client.get(path, headers=alice).status_code == 200


def test_on_trio_many_questions_at_once(authorizer):
    with served("trio_app", "trio", authorizer) as client:
        assert statuses(client) == [200, 403, 403]
        assert client.get("/documents", headers={"x-user": "alice"}).json() == ["1"]
        assert client.get("/documents", headers={"x-user": "bob"}).json() == ["1", "2"]
        assert statuses(client, "/documents/1") == [200, 403, 403]
        authorizer.policies["myapp.GET.documents.__id"] = lambda check: (
            is_reader(check) if check.resource["id"] == "1" else 1 / 0
        )
        answer = client.get("/documents", headers={"x-user": "alice"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert authorizer.connections_accepted <= 2


# -- as their users run them ----------------------------------------------------------


def command(path):
    """Return the command that a file names: the one line that stands indented."""
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    (line,) = re.findall(r"^    (\S.*)$", docstring, re.MULTILINE)
    return line


@pytest.fixture
def warnings_are(request):
    """What this run of the tests makes of warnings, as options for another Python."""
    chosen = request.config.getoption("pythonwarnings") or ["error"]
    return [f"-W{each}" for each in chosen]


def program(line, *more, options=()):
    """Return how to run *line* with this Python."""
    name, *arguments = shlex.split(line)
    module = [] if name == "python" else ["-m", name]
    return [sys.executable, *options, *module, *arguments, *more]


def environment(tmp_path, **more):
    # gunicorn writes into the home directory.
    return {**os.environ, "HOME": str(tmp_path), "PYTHONUNBUFFERED": "1", **more}


@contextlib.contextmanager
def started(arguments, *, cwd, env, workers=0):
    """
    Run a server: its URL, and in the end all that it has printed.

    It must end by itself, and well, when it is told to.
    """
    found = None
    printed = []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(
        arguments, cwd=cwd, env=env, encoding="utf-8", start_new_session=True, **pipes
    ) as process:
        # With all that it has started, if it hangs.
        watchdog = threading.Timer(60, os.killpg, (process.pid, signal.SIGKILL))
        watchdog.start()
        try:
            for line in process.stdout:
                printed.append(line)
                found = found or re.search(r"http://127\.0\.0\.1:[1-9]\d*", line)
                workers -= "Application startup complete" in line
                if found and workers <= 0:
                    break
            else:
                pytest.fail("it did not start: " + "".join(printed))
            yield found[0], printed
        finally:
            process.send_signal(signal.SIGTERM)
            printed += process.stdout
            process.wait()
            watchdog.cancel()
    # uvicorn ends by the signal that it was sent, after all is done.
    assert process.returncode in {0, -signal.SIGTERM}
    assert not re.search("Traceback|Exception|ERROR|WARNING", "".join(printed))


def run(arguments, *, env):
    return subprocess.run(
        arguments,
        cwd=EXAMPLES,
        env=env,
        capture_output=True,
        encoding="utf-8",
        timeout=50,
        check=False,
    )


@pytest.mark.parametrize(
    "name",
    [
        "lifespan_app",
        pytest.param("hooks_app", marks=pytest.mark.slow),
        pytest.param("explicit_acquire", marks=pytest.mark.slow),
        "trio_app",
    ],
)
def test_the_command_of_an_application(name, authorizer, tmp_path, warnings_are):
    line = command(EXAMPLES / f"{name}.py")
    port = ("--port", "0") if line.startswith("uvicorn") else ("--bind", "127.0.0.1:0")
    env = environment(tmp_path, TOPAZ_URL=authorizer.url)
    arguments = program(line, *port, options=warnings_are)
    with (
        started(arguments, cwd=EXAMPLES, env=env) as (url, printed),
        httpx.Client(base_url=url, trust_env=False) as client,
    ):
        assert statuses(client) == [200, 403, 403]
    if line.startswith("uvicorn"):
        assert "Application shutdown complete" in "".join(printed)
    anyio.run(eventually, lambda: authorizer.connections_open == 0)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_command_of_the_program(backend, authorizer, tmp_path, warnings_are):
    line = command(EXAMPLES / "plain_anyio.py")
    env = environment(tmp_path, TOPAZ_URL=authorizer.url)
    *start, last = program(line, options=warnings_are)
    assert last == "trio"
    ended = run([*start, backend], env=env)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == [
        "alice may read 1",
        "alice may not read 2",
        "bob may read 1",
        "bob may read 2",
        "mallory may not read 1",
        "mallory may not read 2",
    ]
    assert authorizer.calls["Is"] == 6
    assert authorizer.connections_accepted <= 2


# -- several processes ----------------------------------------------------------------


def gunicorn(*more):
    line = command(EXAMPLES / "gunicorn.conf.py")
    return program(line, "--bind", "127.0.0.1:0", *more)


def test_the_command_of_several_workers(authorizer, tmp_path):
    env = environment(tmp_path, TOPAZ_URL=authorizer.url)
    two = gunicorn("--workers=2")
    with (
        # Told to end while it begins, a worker just ends.
        started(two, cwd=EXAMPLES, env=env, workers=2) as (url, printed),
        httpx.Client(base_url=url, trust_env=False) as client,
    ):
        # The parent has built the pool, and opened nothing.
        assert statuses(client) == [200, 403, 403]
        assert client.get("/health").json()["connection_pool"]["total"] >= 1
    text = "".join(printed)
    assert text.count("Application shutdown complete") == 2
    assert "SIGKILL" not in text
    anyio.run(eventually, lambda: authorizer.connections_open == 0)


@pytest.mark.slow
def test_a_worker_that_replaces_another_has_a_pool_of_its_own(authorizer, tmp_path):
    env = environment(tmp_path, TOPAZ_URL=authorizer.url)
    few = ("--workers=1", "--max-requests=2", "--max-requests-jitter=0")
    alice = {"x-user": "alice"}
    with started(gunicorn(*few), cwd=EXAMPLES, env=env) as (url, printed):
        # The pool of a worker makes two; so these are those of three workers.
        while authorizer.connections_accepted <= 4:
            # Connected anew: the worker that ends closes what it has accepted, also
            # what it has not read from yet.
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.get(f"{url}/documents", headers=alice, trust_env=False)
                assert answer.status_code == 200
    assert "".join(printed).count("Booting worker") >= 3
    anyio.run(eventually, lambda: authorizer.connections_open == 0)


def test_workers_are_not_killed_before_their_pools_are_closed():
    conf = load("gunicorn.conf")
    grace = inspect.signature(ConnectionPool.close).parameters["grace"].default
    assert grace == conf.POOL
    assert conf.Worker.CONFIG_KWARGS["timeout_graceful_shutdown"] == conf.REQUESTS
    assert conf.graceful_timeout > conf.REQUESTS + conf.POOL
    # A heartbeat comes twice in the timeout, and none once a worker ends.
    assert conf.timeout / 2 > conf.REQUESTS + conf.POOL


# -- a connector of one's own ---------------------------------------------------------


class Stock(grpc.GenericRpcHandler):
    """The service that the example talks to: as many as the name has letters."""

    def __init__(self):
        self.serving = True
        self.peers = set()
        self.arrived = threading.Semaphore(0)
        self.go_on = threading.Event()

    def service(self, details):
        answer = {
            "/stock.v1.Stock/Count": self.count,
            "/grpc.health.v1.Health/Check": self.check,
        }
        return grpc.unary_unary_rpc_method_handler(answer[details.method])

    def count(self, request, context):
        self.peers.add(context.peer())
        name = StringValue.FromString(request).value
        if name == "none":
            context.abort(grpc.StatusCode.CANCELLED, "no such article any more")
        if name.startswith("slow"):
            self.arrived.release()
            self.go_on.wait(50)
        return Int64Value(value=len(name)).SerializeToString()

    def check(self, _request, _context):
        return b"\x08\x01" if self.serving else b"\x08\x02"


@pytest.fixture
def stock():
    service = Stock()
    with ThreadPoolExecutor(4) as executor:
        server = grpc.server(executor, handlers=[service])
        port = server.add_insecure_port("127.0.0.1:0")
        service.target = f"127.0.0.1:{port}"
        server.start()
        yield service
        service.go_on.set()
        server.stop(None).wait()


@pytest.fixture
def example():
    return load("own_connector")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_command_for_another_service(stock, tmp_path, warnings_are, backend):
    line = command(EXAMPLES / "another_service.py").replace("trio", backend)
    env = environment(tmp_path, STOCK_URL=stock.target)
    ended = run(program(line, options=warnings_are), env=env)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == ["apples: 6", "pears: 5"]


def test_the_command_of_the_connector(stock, tmp_path, warnings_are):
    line = command(EXAMPLES / "own_connector.py")
    env = environment(tmp_path, STOCK_URL=stock.target)
    ended = run(program(line, options=warnings_are), env=env)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == ["apples: 6", "pears: 5"]


async def arrived(stock):
    await anyio.to_thread.run_sync(lambda: stock.arrived.acquire(timeout=50))


async def flush(stock, example):
    """
    See that grpc.aio has told this loop of all that ended.

    What is left of a call that was cut off, it would tell the loop of the next test
    instead, and fail because this one is closed.
    """
    connection = await example.StockConnector(stock.target).connect(5.0)
    await connection.close(0)


@asyncio_only
async def test_each_connection_of_the_connector_is_a_socket(stock, example):
    async with ConnectionPool(connector=example.StockConnector(stock.target)) as pool:
        async with anyio.create_task_group() as tasks:
            for name in ("slow figs", "slow kiwis", "slow plums"):
                tasks.start_soon(example.count, pool, name)
            for _ in range(3):
                await arrived(stock)
            assert pool.status().busy == 3
            stock.go_on.set()
        assert len(stock.peers) == 3


@asyncio_only
async def test_a_call_of_the_connector_is_cancelled_as_anyio_does_it(stock, example):
    async with ConnectionPool(connector=example.StockConnector(stock.target)) as pool:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(example.count, pool, "slow figs")
                await arrived(stock)
                scope.cancel()
        assert scope.cancelled_caught
        assert pool.status().busy == 0
        stock.go_on.set()
        assert await example.count(pool, "figs") == 4


@asyncio_only
async def test_a_call_that_its_pool_is_closed_under_is_lost(stock, example):
    pool = ConnectionPool(connector=example.StockConnector(stock.target))
    lost = []

    async def count():
        with pytest.raises(ConnectionLost) as raised:
            await example.count(pool, "slow figs")
        lost.append(raised.value)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count)
        await arrived(stock)
        await pool.close(grace=0)
    assert len(lost) == 1
    stock.go_on.set()
    await flush(stock, example)


@asyncio_only
async def test_a_call_that_the_server_cancels_is_answered(stock, example):
    async with ConnectionPool(connector=example.StockConnector(stock.target)) as pool:
        with pytest.raises(grpc.aio.AioRpcError, match="no such article") as raised:
            await example.count(pool, "none")
        assert raised.value.code() is grpc.StatusCode.CANCELLED
        assert pool.status().suspect == 0
        await flush(stock, example)


@asyncio_only
async def test_a_server_that_does_not_serve_gets_no_connection(stock, example):
    stock.serving = False
    connector = example.StockConnector(stock.target)
    async with ConnectionPool(connector=connector, retry_on_failure=False) as pool:
        with pytest.raises(ConnectFailed, match=stock.target):
            await example.count(pool, "figs")
    assert stock.peers == set()


@asyncio_only
async def test_a_server_that_ceases_to_serve_fails_its_probes(stock, example):
    async with (
        ConnectionPool(connector=example.StockConnector(stock.target)) as pool,
        pool.acquire() as conn,
    ):
        await conn.connection.probe(5.0)
        stock.serving = False
        with pytest.raises(ConnectionLost):
            await conn.connection.probe(5.0)


# -- containers -----------------------------------------------------------------------


def parsed(*names):
    return yaml.safe_load(COMPOSE.joinpath(*names).read_text())


@pytest.fixture(scope="module")
def services():
    return parsed("docker-compose.yaml")["services"]


def seconds(text):
    number, unit = re.fullmatch(r"(\d+)(s|m)", text).groups()
    return int(number) * {"s": 1, "m": 60}[unit]


def instructions():
    """Return the lines of the Dockerfile, as instruction and arguments."""
    lines = (COMPOSE / "Dockerfile").read_text().splitlines()
    return [tuple(line.split(" ", 1)) for line in lines if line and line[0] != "#"]


def dockerfile_command():
    (words,) = [rest for name, rest in instructions() if name == "CMD"]
    return json.loads(words)


def test_each_container_is_pinned_checked_and_for_this_machine_only(services):
    assert set(services) == {"topaz", "app", "prometheus"}
    for service in services.values():
        assert set(service) <= {
            *("image", "build", "command", "environment", "volumes", "ports"),
            *("depends_on", "healthcheck", "restart", "stop_grace_period"),
        }
        if "build" not in service:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        for port in service["ports"]:
            assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port)
        for other, needed in service.get("depends_on", {}).items():
            assert other in services
            assert needed["condition"] in {"service_started", "service_healthy"}
        check = service["healthcheck"]
        assert set(check) == {"test", "interval", "timeout", "retries", "start_period"}
        assert check["test"][0] == "CMD"
        assert seconds(check["timeout"]) < seconds(check["interval"])


def test_all_that_is_mounted_is_there(services):
    named = parsed("docker-compose.yaml")["volumes"]
    used = set()
    for service in services.values():
        for volume in service.get("volumes", ()):
            source, target, *mode = volume.split(":")
            assert target.startswith("/")
            if source.startswith("."):
                assert (COMPOSE / source).exists(), source
                assert mode == ["ro"]
            else:
                used.add(source)
    assert used == set(named)


def test_the_image_is_built_from_what_is_there(services):
    build = services["app"]["build"]
    context = (COMPOSE / build["context"]).resolve()
    assert context == ROOT
    assert (context / build["dockerfile"]).samefile(COMPOSE / "Dockerfile")
    for name, rest in instructions():
        if name == "COPY":
            *sources, _ = rest.split()
            assert all((context / source).exists() for source in sources)
    assert re.fullmatch(r"python:3\.\d+-slim", dict(instructions())["FROM"])


def test_the_container_is_not_killed_before_its_pool_is_closed(services):
    words = dockerfile_command()
    requests = int(words[words.index("--timeout-graceful-shutdown") + 1])
    grace = inspect.signature(ConnectionPool.close).parameters["grace"].default
    assert seconds(services["app"]["stop_grace_period"]) > requests + grace


def test_prometheus_scrapes_the_application_and_has_the_alerts(services):
    config = parsed("prometheus", "prometheus.yml")
    mounted = dict(
        reversed(volume.split(":")[:2]) for volume in services["prometheus"]["volumes"]
    )
    assert mounted["/etc/prometheus/prometheus.yml"] == "./prometheus/prometheus.yml"
    (rules,) = config["rule_files"]
    alerts = ROOT / "observability" / "alerts.yaml"
    assert (COMPOSE / mounted[rules]).samefile(alerts)
    # Four of them in the shortest window of the alerts.
    assert 4 * seconds(config["global"]["scrape_interval"]) <= 5 * 60
    (job,) = config["scrape_configs"]
    (target,) = job["dns_sd_configs"]
    assert target["names"] == ["app"]
    words = dockerfile_command()
    assert str(target["port"]) == words[words.index("--port") + 1] == "8000"


def test_topaz_listens_where_the_pool_connects_to(services):
    config = parsed("topaz", "config.yaml")
    assert config["version"] == 2
    api = config["api"]
    listeners = api["services"]
    for listener in listeners.values():
        assert set(listener.get("needs", ())) <= set(listeners)
        assert set(listener) - {"needs"} == {"grpc", "gateway"}
    assert (
        config["remote_directory"]["address"]
        == (listeners["reader"]["grpc"]["listen_address"])
    )
    assert config["remote_directory"]["no_tls"] is True
    authorizer = listeners["authorizer"]
    _, port = authorizer["grpc"]["listen_address"].split(":")
    assert services["app"]["environment"]["TOPAZ_URL"] == f"topaz:{port}"
    assert services["topaz"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    _, port = authorizer["gateway"]["listen_address"].split(":")
    assert f"//127.0.0.1:{port}/" in services["topaz"]["healthcheck"]["test"][-1]
    assert api["health"]["listen_address"].endswith(":9494")
    (bundle,) = config["opa"]["local_bundles"]["paths"]
    assert f"./topaz/policies:{bundle}:ro" in services["topaz"]["volumes"]


def test_topaz_has_all_the_policies_that_the_examples_ask_for():
    packages = {}
    for path in POLICIES.iterdir():
        text = path.read_text()
        (package,) = re.findall(r"^package (\S+)$", text, re.MULTILINE)
        packages[package] = text
        assert "\nimport rego.v1\n" in text
    assert set(packages) == {*DECISIONS, "myapp.users"}
    facts = dict(re.findall(r"^(\w+) := (.+)$", packages["myapp.users"], re.MULTILINE))
    for path in DECISIONS:
        assert "\ndefault allowed := false\n" in packages[path]
        assert "\nallowed if " in packages[path]
        used = re.findall(r"\bdata\.myapp\.users\.(\w+)", packages[path])
        assert used
        assert set(used) <= set(facts)
    assert ast.literal_eval(facts["known"]) == USERS
    assert ast.literal_eval(facts["owners"]) == OWNERS


def test_the_container_runs_an_application_with_metrics(
    services, authorizer, tmp_path, warnings_are
):
    words = dockerfile_command()
    assert words[:2] == shlex.split(command(COMPOSE / "app.py"))
    places = {"0.0.0.0": "127.0.0.1", "8000": "0"}
    line = shlex.join(places.get(word, word) for word in words)
    env = environment(tmp_path, TOPAZ_URL=authorizer.url)
    arguments = program(line, options=warnings_are)
    with (
        started(arguments, cwd=COMPOSE, env=env) as (url, _),
        httpx.Client(base_url=url, trust_env=False) as client,
    ):
        assert statuses(client) == [200, 403, 403]
        assert statuses(client, "/documents/1") == [200, 403, 403]
        alice, bob = {"x-user": "alice"}, {"x-user": "bob"}
        assert client.delete("/documents/1", headers=alice).status_code == 200
        assert client.delete("/documents/1", headers=bob).status_code == 403
        assert client.get("/health").json()["status"] == "ok"
        (job,) = parsed("prometheus", "prometheus.yml")["scrape_configs"]
        text = client.get(job["metrics_path"]).text
        line = r'^topaz_pool_acquisitions_total\{.*pool="main"\} 8\.0$'
        assert re.search(line, text, re.MULTILINE)
        _, name, option, code = services["app"]["healthcheck"]["test"]
        assert (name, option) == ("python", "-c")
        here = code.replace("http://127.0.0.1:8000", url)
        assert here != code
        subprocess.run([sys.executable, "-c", here], check=True, timeout=50)


def test_topaz_is_the_release_that_is_tested(services):
    release = re.search(r'TOPAZ_RELEASE = "v(.+)"', (ROOT / "noxfile.py").read_text())
    assert services["topaz"]["image"].endswith(f"/topaz:{release[1]}")


def with_free_ports(text):
    """Return a configuration with other ports, and the address of each old one."""
    with contextlib.ExitStack() as free:

        def here(match):
            port = free.enter_context(free_port()).getsockname()[1]
            return ports.setdefault(int(match[1]), f"127.0.0.1:{port}")

        ports = {}
        return re.sub(r"(?:0\.0\.0\.0|127\.0\.0\.1):(\d+)", here, text), ports


@pytest.mark.skipif(REAL is None, reason=MISSING)
async def test_topaz_takes_the_configuration_and_the_policy_of_the_quickstart(tmp_path):
    home = tmp_path / "quickstart"
    shutil.copytree(EXAMPLES / "quickstart", home)
    text, ports = with_free_ports((home / "topaz.yaml").read_text())
    text = text.replace("[policies]", f"[{home / 'policies'}]")
    with Topazd([REAL], tmp_path) as server:
        server.config_file = home / "topaz.yaml"
        server.config_file.write_text(
            text.replace("directory.db", str(home / "directory.db"))
        )
        server.port = int(ports[8282].rpartition(":")[2])
        await anyio.to_thread.run_sync(server.start)
        pool = ConnectionPool(min_connections=0)
        pool.configure(server.options)
        async with pool, pool.acquire() as conn:
            for user, allowed in (("alice", True), ("mallory", False)):
                answer = await conn.decisions(
                    policy_path="myapp.GET.documents.__id",
                    identity=Identity(IdentityType.MANUAL, user),
                )
                assert answer == {"allowed": allowed}


@pytest.mark.skipif(REAL is None, reason=MISSING)
async def test_topaz_takes_its_configuration_and_policies(tmp_path):
    text, ports = with_free_ports((COMPOSE / "topaz" / "config.yaml").read_text())
    text = text.replace("/policies", str(POLICIES)).replace("/db", str(tmp_path))
    with Topazd([REAL], tmp_path) as server:
        server.config_file = tmp_path / "compose.yaml"
        server.config_file.write_text(text)
        server.port = int(ports[8282].rpartition(":")[2])
        await anyio.to_thread.run_sync(server.start)
        pool = ConnectionPool(min_connections=0)
        pool.configure(server.options)
        async with pool, pool.acquire() as conn:
            for path, user, document in itertools.product(DECISIONS, PEOPLE, OWNERS):
                identity = Identity(IdentityType.MANUAL, user)
                answer = await conn.decisions(
                    policy_path=path,
                    identity=identity,
                    resource_context={"id": document},
                )
                check = asked(path, user, document)
                assert answer == {"allowed": DECISIONS[path](check)}, check


# -- the list -------------------------------------------------------------------------


def test_the_readme_lists_each_example_with_its_command():
    text = (EXAMPLES / "README.md").read_text()
    row = r"^\| \[`(.+?)`\]\((.+?)\) \| [^|]* \| `([^`]+)` \|"
    rows = re.findall(row, text, re.MULTILINE)
    listed = {name: line for name, _, line in rows}
    files = {path.name: command(path) for path in EXAMPLES.glob("*.py")}
    (line,) = re.findall(
        r"^# {5}(\S.*)$", (COMPOSE / "docker-compose.yaml").read_text(), re.MULTILINE
    )
    here = line.replace("compose", "compose -f compose/docker-compose.yaml", 1)
    assert listed == {**files, "compose/": here, "quickstart/": "uvicorn main:app"}
    assert all((EXAMPLES / target).exists() for _, target, _ in rows)


def test_the_readme_says_who_may_do_what():
    text = (EXAMPLES / "README.md").read_text()
    rows = re.findall(
        r"^\| `(myapp\S+)` \| (.+?) \| (.+?) \| (.+?) \|$", text, re.MULTILINE
    )

    def cell(path, user):
        may = [DECISIONS[path](asked(path, user, each)) for each in OWNERS]
        if not path.endswith("__id"):
            return "yes" if all(may) else "no"
        return ", ".join(itertools.compress(OWNERS, may)) or "none"

    expected = [(path, *(cell(path, user) for user in PEOPLE)) for path in DECISIONS]
    assert rows == expected
