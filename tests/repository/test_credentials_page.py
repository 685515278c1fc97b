"""Test that the page on keys and certificates is true."""

from __future__ import annotations

import re

import anyio
import attrs
import pytest

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionPool,
    Identity,
    IdentityType,
    TopazConfig,
)
from kit.backends import backends
from kit.configs import Requests
from kit.examples import ROOT
from kit.pages import DOCS, codes


pytestmark = pytest.mark.real_clock

PAGE = (DOCS / "credentials.md").read_text()
ROTATE, CALL, NAMES = codes(DOCS / "credentials.md", "python")
REQUEST = Requests({"type": "http", "headers": []})


@backends
def test_the_key_of_the_page_rotates(backend, embedded_authorizer):
    seen, issued = [], []
    embedded_authorizer.policies = lambda check: seen.append(check.metadata) or True

    async def renew():
        issued.append(f"key {len(issued)}")
        return issued[-1], 0  # it is to be renewed at once

    names = {"renew": renew}
    exec(compile(ROTATE, "credentials.md", "exec", dont_inherit=True), names)
    options = attrs.evolve(names["options"], url=embedded_authorizer.url, insecure=True)
    config = TopazConfig(
        authorizer_options=options,
        policy_path_root="myapp",
        identity_provider=lambda _request: Identity(IdentityType.NONE),
        connection_pool=ConnectionPool(min_connections=0),
    )
    names = {"config": config, "request": REQUEST}
    body = CALL.replace("\n", "\n    ")
    exec(f"async def ask(config, request):\n    {body}", names)

    async def program():
        async with config.connection_pool:
            for _ in range(2):
                await names["ask"](config, REQUEST)

    anyio.run(program, backend=backend)
    assert [each["x-region"] for each in seen] == ["eu", "eu"]
    keys = [each["authorization"] for each in seen]
    assert len(set(keys)) == 2
    assert {key.removeprefix("Bearer ") for key in keys} <= set(issued)


def test_the_options_of_the_page_exist():
    table = PAGE.partition("## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", table, re.MULTILINE)
    listed = {name: default for names, default in rows for name in names.split(", ")}
    fields = {f"`{field.name}`": field for field in attrs.fields(AuthorizerOptions)}
    others = {"`url`", "`tenant_id`", "`api_key`", "`insecure`"}
    assert listed.keys() == fields.keys() - others
    for name, default in listed.items():
        shown = {"4 MiB": 4 * 2**20, "None": None, "`()`": ()}[default]
        assert fields[name].default == shown


def test_the_names_of_the_page_are_accepted():
    options = eval(NAMES, {"AuthorizerOptions": AuthorizerOptions})
    assert (options.server_name, options.authority) == ("topaz.internal", "policies")


def test_the_readme_links_the_page():
    assert "](docs/credentials.md)" in (ROOT / "README.md").read_text()
