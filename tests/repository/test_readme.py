"""Test that the README and the pages are true: commands, code, tables."""

from __future__ import annotations

import inspect
import re
import socket
import subprocess
import sys
import textwrap
from typing import get_args

import anyio
import httpx
import pytest
import yaml
from fastapi import FastAPI

from fastapi_topaz import (
    ConnectionPool,
    DecisionCache,
    Identity,
    IdentityType,
    TopazConfig,
)
from fastapi_topaz._cli.demo import serving
from fastapi_topaz._pool.state.status import CloseReason, LimitReason
from fastapi_topaz._telemetry.decisions import (
    CHECK_TYPE,
    DECISIONS,
    OUTCOMES,
    SOURCES,
    STATES,
)
from fastapi_topaz._telemetry.instruments import BOUNDARIES, TOPAZ
from fastapi_topaz._telemetry.semconv import DB_CLIENT
from fastapi_topaz.exceptions import FailureReason
from kit.examples import ROOT
from kit.pages import DOCS, codes


pytestmark = pytest.mark.real_clock

README = (ROOT / "README.md").read_text()
OBSERVABILITY = (DOCS / "observability.md").read_text()
READINESS = (DOCS / "readiness.md").read_text()
PARAMETERS = (DOCS / "parameters.md").read_text()
BLOCKS = codes(DOCS / "fastapi.md", "python")
QUICKSTART = ROOT / "examples" / "quickstart"


def test_the_readme_has_at_most_120_lines():
    assert len(README.splitlines()) <= 120


def test_the_quickstart_matches_the_example():
    (app,) = codes(ROOT / "README.md", "python")
    assert (QUICKSTART / "main.py").read_text().partition('"""\n\n')[2].replace(
        "from __future__ import annotations\n\n", ""
    ) == app
    (policy,) = codes(ROOT / "README.md", "rego")
    assert (QUICKSTART / "policies" / "document.rego").read_text() == policy


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_quickstart_gives_the_printed_answers(backend, embedded_authorizer):
    embedded_authorizer.policies = {
        "myapp.GET.documents.__id": lambda check: check.identity.value == "alice"
    }
    (code,) = codes(ROOT / "README.md", "python")
    asking = code.replace("127.0.0.1:8282", embedded_authorizer.url)
    names = {}
    exec(compile(asking, "README.md", "exec", dont_inherit=True), names)
    with serving(names["app"], backend) as url, httpx.Client(base_url=url) as client:
        _, _, dialogue = codes(ROOT / "README.md", "console")
        lines = dialogue.splitlines()
        for command, answer in zip(lines[::2], lines[1::2], strict=True):
            user, path = re.search(r"x-user: (\w+)' \S+8000(\S+)", command).groups()
            assert client.get(path, headers={"x-user": user}).text == answer


def test_each_link_of_the_pages_has_a_target():
    pages = [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_ci_runs_the_test_command_word_for_word():
    demo, tests = codes(ROOT / "README.md", "console")[0].splitlines()
    assert demo.endswith("fastapi-topaz-pool demo")
    assert tests in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_application_of_the_testing_page_runs(backend, embedded_authorizer):
    embedded_authorizer.policies = {
        "myapp.GET.documents.__id": lambda check: (
            check.identity.value == "alice" and check.resource["id"] == "7"
        )
    }
    names = {}
    code = BLOCKS[0].replace("127.0.0.1:8282", embedded_authorizer.url)
    exec(compile(code, "fastapi.md", "exec", dont_inherit=True), names)
    with serving(names["app"], backend) as url, httpx.Client(base_url=url) as client:
        alice = {"x-user": "alice"}
        assert client.get("/documents/7", headers=alice).json() == {"id": "7"}
        assert client.get("/documents/8", headers=alice).status_code == 403
        assert client.get("/documents/7").status_code == 403
        assert client.get("/health").json()["status"] == "ok"


async def test_the_program_without_fastapi_runs(embedded_authorizer):
    embedded_authorizer.policies = {"myapp.GET.documents": True}
    code = BLOCKS[1].replace(
        'AuthorizerOptions(url="localhost:8282", insecure=True)', "options"
    )
    body = textwrap.indent(code, "    ")
    names = {"ConnectionPool": ConnectionPool, "options": embedded_authorizer.options}
    source = f"async def program():\n{body}\n    return allowed\n"
    exec(compile(source, "README.md", "exec", dont_inherit=True), names)
    with anyio.fail_after(30):
        assert await names["program"]() is True


def test_the_test_of_the_page_runs():
    names = {"pool": ConnectionPool()}
    exec(compile(BLOCKS[2], "README.md", "exec", dont_inherit=True), names)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_probes_of_the_page_on_readiness_run(backend, embedded_authorizer):
    config = TopazConfig(
        authorizer_options=embedded_authorizer.options,
        policy_path_root="myapp",
        identity_provider=lambda _request: Identity(IdentityType.NONE),
        # One connection, so that no second one answers at another moment.
        connection_pool=ConnectionPool(min_connections=0),
    )
    app = FastAPI(lifespan=config.lifespan)
    code, _ = codes(DOCS / "readiness.md", "python")
    names = {"app": app, "config": config}
    exec(compile(code, "readiness.md", "exec", dont_inherit=True), names)
    with serving(app, backend) as url, httpx.Client(base_url=url) as client:

        def probe(path):
            response = client.get(path)
            return response.status_code, response.json()

        assert probe("/readyz") == (200, {"ready": True})
        embedded_authorizer.freeze()
        for entry in config.connection_pool._open_pool.state.open:
            entry.proven_at -= 1  # as if it had answered that long ago
        assert probe("/readyz") == (503, {"ready": False})
        assert probe("/livez") == (200, {"status": "ok"})
        embedded_authorizer.thaw()
        assert probe("/readyz") == (200, {"ready": True})
    assert not config.connection_pool.status().ready


@pytest.mark.parametrize("fallback", ["error", "deny"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_startup_probe_of_the_page_finds_a_wrong_configuration(
    backend, fallback, embedded_authorizer, caplog
):
    config = TopazConfig(
        authorizer_options=embedded_authorizer.options,
        policy_path_root="myapp",
        identity_provider=lambda _request: Identity(IdentityType.NONE),
        connection_pool=ConnectionPool(min_connections=0),
        check_timeout=1,
        decision_cache=DecisionCache(),
        fallback=fallback,
    )
    app = FastAPI(lifespan=config.lifespan)
    _, code = codes(DOCS / "readiness.md", "python")
    names = {"app": app, "config": config}
    exec(compile(code, "readiness.md", "exec", dont_inherit=True), names)
    with serving(app, backend) as url, httpx.Client(base_url=url) as client:

        def probe():
            response = client.get("/startupz")
            return response.status_code, response.json()

        started, failed = (200, {"started": True}), (503, {"started": False})
        for allowed in (True, False):
            embedded_authorizer.policies = {"myapp.GET.documents": allowed}
            assert probe() == started
        embedded_authorizer.policies = {"other.GET.documents": True}
        assert probe() == failed
        embedded_authorizer.policies = {"myapp.GET.documents": True}
        assert probe() == started
        for status in ("UNAUTHENTICATED", "INTERNAL"):
            embedded_authorizer.fail(status, methods=["Is"])
            assert probe() == failed
        embedded_authorizer.heal()
        assert probe() == started
        embedded_authorizer.delay = 30
        assert probe() == failed
    assert "there is no such policy" in caplog.text
    assert "the api_key or credentials are missing or wrong" in caplog.text


def test_the_readiness_manifest_matches_the_routes_and_the_default():
    (manifest,) = codes(DOCS / "readiness.md", "yaml")
    probes = yaml.safe_load(manifest)
    paths = {probe["httpGet"]["path"] for probe in probes.values()}
    assert paths == set(re.findall(r'@app.get\("(.*)"\)', READINESS))
    timeout = inspect.signature(TopazConfig.is_ready).parameters["timeout"].default
    assert f"is_ready(timeout={timeout})" in READINESS
    assert probes["readinessProbe"]["timeoutSeconds"] > timeout
    check = inspect.signature(TopazConfig).parameters["check_timeout"].default
    assert probes["startupProbe"]["timeoutSeconds"] > check


def test_every_parameter_is_in_the_table_with_its_default():
    for kind in (ConnectionPool, TopazConfig):
        _, _, section = PARAMETERS.partition(f"\n## Parameters of `{kind.__name__}`\n")
        section = section.partition("\n## ")[0]
        rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.MULTILINE)
        parameters = inspect.signature(kind).parameters.items()
        assert {name: default_of(each) for name, each in parameters} == dict(rows)
        assert len(rows) == len(parameters)


def default_of(parameter):
    required = parameter.default is parameter.empty
    return "required" if required else str(parameter.default)


def test_the_metrics_are_in_the_table_as_the_code_has_them():
    expected = []
    for convention in (TOPAZ, DECISIONS):
        for instruments, kind, suffix in (
            (convention.levels, "gauge", ""),
            (convention.events, "counter", "_total"),
            (convention.durations, "histogram", ""),
        ):
            for each in instruments:
                unit = "_seconds" if each.unit == "s" else ""
                label = each.label
                labels = label if isinstance(label, str) else ",".join(label)
                name = each.name + unit + suffix
                expected.append((name, labels, kind, each.description))
    row = r"^\| `(topaz_\w+)(?:\{([\w,]+)[^}]*\})?` \| (\w+) \| (.+) \|$"
    assert re.findall(row, OBSERVABILITY, re.MULTILINE) == expected


def test_every_reason_is_documented():
    for reasons in (CloseReason, FailureReason, LimitReason):
        for reason in get_args(reasons):
            assert f"`{reason}`" in OBSERVABILITY
    for each in (*DECISIONS.events, *DECISIONS.durations):
        for label in (each.label,) if isinstance(each.label, str) else each.label:
            assert f"`{label}`" in OBSERVABILITY or each.label in ("", "reason")
    for value in (*SOURCES, *OUTCOMES, *STATES, CHECK_TYPE):
        assert f"`{value}`" in OBSERVABILITY
    listed = ", ".join(f"{boundary:g}" for boundary in BOUNDARIES)
    assert listed.replace(", 10", " and 10") in OBSERVABILITY


def test_every_opentelemetry_name_is_documented():
    for instrument in (*DB_CLIENT.levels, *DB_CLIENT.events, *DB_CLIENT.durations):
        short = instrument.name.removeprefix("db.client.connection")
        assert f"`{short}`" in OBSERVABILITY or f"`{instrument.name}`" in OBSERVABILITY


def test_every_attribute_of_a_span_is_in_the_table():
    surface = (ROOT / "tests" / "repository" / "surface.txt").read_text()
    sets = re.findall(r"^topaz\.check: (.+)$", surface, re.MULTILINE)
    found = {name for names in sets for name in names.split(", ")}
    # The span of surface.txt is of a pool without a name.
    traces = OBSERVABILITY.partition("## Traces")[2].partition("| Event |")[0]
    table = re.findall(r"^\| `([\w.]+)` \|", traces, re.MULTILINE)
    assert sorted(table) == sorted({*found, "topaz.pool"})


@pytest.mark.costly
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_application_with_metrics_runs(backend, embedded_authorizer):
    """Run in a separate process, because the test sets the global provider."""
    (code,) = codes(DOCS / "observability.md", "python")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    program = f"""
import httpx
from fastapi import Depends
from fastapi_topaz import *
from fastapi_topaz._cli.demo import serving
{code.replace("127.0.0.1:8282", embedded_authorizer.url).replace("9464", str(port))}
guard = Depends(require_policy_allowed(config, "myapp.GET.documents"))
app.get("/documents", dependencies=[guard])(lambda: 1)
with serving(app, {backend!r}) as url:
    assert httpx.get(url + "/documents").status_code == 200
    assert httpx.get(url + "/metrics").status_code == 404
    print(httpx.get("http://127.0.0.1:{port}/metrics").text)
"""
    embedded_authorizer.policies = {"myapp.GET.documents": True}
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    line = r'^topaz_pool_acquisitions_total\{.*pool="main"\} 1\.0$'
    assert re.search(line, result.stdout, re.MULTILINE)
    decided = r'^topaz_auth_requests_total\{.*decision="allowed".*\} 1\.0$'
    assert re.search(decided, result.stdout, re.MULTILINE)
