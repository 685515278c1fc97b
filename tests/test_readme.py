"""What the README says is true: its commands, its code, its tables."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

import anyio
import httpx
import pytest

from fastapi_topaz import ConnectionPool
from fastapi_topaz import _metrics as metrics
from fastapi_topaz._demo import serving


pytestmark = pytest.mark.real_clock

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_ci_runs_the_test_command_word_for_word():
    (block,) = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    demo, tests = block.splitlines()
    assert demo.endswith("fastapi-topaz demo")
    assert tests in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_application_of_the_readme_runs(backend, embedded_authorizer):
    embedded_authorizer.policies = {
        "myapp.GET.documents.__id": lambda check: (
            check.identity.value == "alice" and check.resource["id"] == "7"
        )
    }
    names = {"options": embedded_authorizer.options}
    code = BLOCKS[0].replace('AuthorizerOptions(url="localhost:8282")', "options")
    exec(compile(code, "README.md", "exec", dont_inherit=True), names)
    with serving(names["app"], backend) as url, httpx.Client(base_url=url) as client:
        alice = {"user": "alice"}
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


def test_the_test_of_the_readme_runs():
    names = {"pool": ConnectionPool()}
    exec(compile(BLOCKS[2], "README.md", "exec", dont_inherit=True), names)


def test_every_parameter_is_in_the_table_with_its_default():
    table = README.partition("## Parameters")[2].partition("## Metrics")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, re.MULTILINE))
    parameters = inspect.signature(ConnectionPool).parameters
    assert {name: str(p.default) for name, p in parameters.items()} == rows


def test_every_metric_is_in_the_table():
    named = set(re.findall(r"^\| `(topaz_pool_\w+)", README, re.MULTILINE))
    expected = {"topaz_pool_connections_total"}
    expected |= {name for name, *_ in metrics.GAUGES}
    counters = (*metrics.COUNTERS, *metrics.COUNTERS_BY_REASON)
    expected |= {f"{name}_total" for name, *_ in counters}
    for name in ("acquire_latency", "hold_time", "connect_time"):
        expected.add(f"topaz_pool_{name}_seconds")
    assert named == expected
