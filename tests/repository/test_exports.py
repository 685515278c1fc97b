"""Test that the public names are the same at run time and for type checkers."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import subprocess
import sys

import pytest

import fastapi_topaz
from fastapi_topaz import exceptions, testing
from kit.examples import ROOT


PUBLIC = [
    "AuthorizerOptions",
    "BusStatus",
    "CacheStatus",
    "CircuitBreaker",
    "CircuitOpen",
    "CircuitStatus",
    "ConnectFailed",
    "ConnectionLost",
    "ConnectionPool",
    "ConnectionStatus",
    "Connector",
    "CredentialsFailed",
    "Decision",
    "DecisionCache",
    "GrpcConnector",
    "Identity",
    "IdentityType",
    "InvalidationBus",
    "PoolClosed",
    "PoolError",
    "PoolMisuse",
    "PoolSaturated",
    "PoolStatus",
    "PoolTimeout",
    "PooledConnection",
    "Target",
    "TopazConfig",
    "TopazError",
    "Verdict",
    "require_policy_allowed",
    "require_policy_auto",
    "status_app",
]


def test_the_public_names_are_these():
    assert fastapi_topaz.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(fastapi_topaz, name).__doc__


@pytest.mark.parametrize("module", [fastapi_topaz, testing])
def test_all_is_sorted_and_complete(module):
    assert sorted(module.__all__) == sorted(set(module.__all__))
    assert all(hasattr(module, name) for name in module.__all__)


def test_the_error_hierarchy_matches_the_documentation():
    tree = {
        "PoolError": (exceptions.TopazError,),
        "CircuitOpen": (exceptions.PoolError,),
        "CredentialsFailed": (exceptions.PoolError,),
        "PoolTimeout": (exceptions.PoolError, TimeoutError),
        "PoolClosed": (exceptions.PoolError, RuntimeError),
        "PoolMisuse": (exceptions.PoolError, RuntimeError),
        "PoolSaturated": (exceptions.PoolError,),
        "ConnectFailed": (exceptions.PoolError, ConnectionError),
        "ConnectionLost": (exceptions.PoolError, ConnectionError),
    }
    for name, bases in tree.items():
        assert getattr(exceptions, name).__bases__ == bases


@pytest.mark.parametrize(
    "cls", [fastapi_topaz.ConnectionPool, fastapi_topaz.PooledConnection]
)
def test_every_public_method_is_documented(cls):
    for name, member in inspect.getmembers(cls, callable):
        if not name.startswith("_"):
            assert inspect.getdoc(member), name


def test_every_parameter_of_the_pool_is_documented_with_its_default():
    doc = inspect.getdoc(fastapi_topaz.ConnectionPool)
    for name in inspect.signature(fastapi_topaz.ConnectionPool).parameters:
        assert f"{name}: " in doc, name


def test_the_package_is_typed():
    assert (ROOT / "fastapi_topaz" / "py.typed").exists()


def test_importing_needs_no_extra():
    """The import loads neither trio nor the dependencies of tests and the demo."""
    program = """
import sys
blocked = {"trio", "trustme", "pytest", "typer", "rich", "httpx", "uvicorn",
           "hypercorn"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import fastapi_topaz, fastapi_topaz.testing
from fastapi_topaz.testing import EmbeddedAuthorizer
import asyncio

async def main():
    with EmbeddedAuthorizer({"p": True}) as authorizer:
        pool = fastapi_topaz.ConnectionPool()
        pool.configure(authorizer.options)
        async with pool, pool.acquire() as conn:
            print(await conn.decisions(policy_path="p"))

asyncio.run(main())
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.stdout == "{'allowed': True}\n", result.stderr


def test_fastapi_is_imported_only_if_needed():
    """FastAPI is the slowest import. A program without FastAPI uses pools, too."""
    program = """
import sys
import fastapi_topaz
print({"fastapi", "starlette", "pydantic"} & sys.modules.keys())
from fastapi_topaz import require_policy_allowed, require_policy_auto
print("fastapi" in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.stdout == "set()\nTrue\n", result.stderr
    assert set(fastapi_topaz.__all__) <= set(dir(fastapi_topaz))
    with pytest.raises(AttributeError, match="'fastapi_topaz' has no attribute 'no'"):
        fastapi_topaz.no  # noqa: B018


def test_the_version_is_the_newest_release_in_the_changelog():
    text = (ROOT / "CHANGELOG.md").read_text()
    releases = re.findall(
        r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", text, re.MULTILINE
    )
    assert releases[0] == importlib.metadata.version("fastapi-topaz-pool")
    assert releases == sorted(set(releases), reverse=True)
