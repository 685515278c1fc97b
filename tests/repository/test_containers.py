"""Test the containers of the examples."""

from __future__ import annotations

import ast
import contextlib
import inspect
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys

import anyio
import httpx
import pytest
import yaml

from fastapi_topaz import ConnectionPool, Identity, IdentityType
from kit.examples import (
    COMPOSE,
    DECISIONS,
    EXAMPLES,
    OWNERS,
    PEOPLE,
    ROOT,
    USERS,
    asked,
    command,
    environment,
    program,
    started,
    statuses,
)
from kit.topaz.server import MISSING, REAL, Topazd, free_port


pytestmark = pytest.mark.real_clock


POLICIES = COMPOSE / "topaz" / "policies"


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


def test_each_container_is_pinned_health_checked_and_on_localhost(services):
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


def test_every_mounted_file_exists(services):
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


def test_the_image_is_built_from_existing_files(services):
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
    # Four scrapes in the shortest window of the alerts.
    assert 4 * seconds(config["global"]["scrape_interval"]) <= 5 * 60
    (job,) = config["scrape_configs"]
    (target,) = job["dns_sd_configs"]
    assert target["names"] == ["app"]
    words = dockerfile_command()
    assert str(target["port"]) == words[words.index("--port") + 1] == "8000"


def test_topaz_listens_on_the_address_of_the_pool(services):
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


def test_topaz_has_all_policies_of_the_examples():
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


def test_topaz_is_the_tested_release(services):
    release = re.search(r'TOPAZ_RELEASE = "v(.+)"', (ROOT / "noxfile.py").read_text())
    assert services["topaz"]["image"].endswith(f"/topaz:{release[1]}")


def with_free_ports(text):
    """Return a configuration with other ports, and the new address of each old one."""
    with contextlib.ExitStack() as free:

        def here(match):
            port = free.enter_context(free_port()).getsockname()[1]
            return ports.setdefault(int(match[1]), f"127.0.0.1:{port}")

        ports = {}
        return re.sub(r"(?:0\.0\.0\.0|127\.0\.0\.1):(\d+)", here, text), ports


@pytest.mark.skipif(REAL is None, reason=MISSING)
async def test_topaz_accepts_the_configuration_of_the_quickstart(tmp_path):
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
async def test_topaz_accepts_its_configuration_and_policies(tmp_path):
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
