"""Test `doctor` against Topaz itself. `nox -s topaz` runs it."""

from __future__ import annotations

import json

import anyio
import attrs
import pytest

from fastapi_topaz._cli.doctor.checkup import examine
from fastapi_topaz._cli.doctor.findings import Level
from kit.broken import PATIENCE, problems, secured
from kit.topaz.server import MISSING, REAL, Topazd


pytestmark = [
    pytest.mark.real_clock,
    pytest.mark.skipif(REAL is None, reason=MISSING),
]

KEY = "opensesame"


async def test_topaz_is_examined_from_dns_to_its_policies(tmp_path):
    with Topazd([REAL], tmp_path, tls=True, api_key=KEY) as server:
        await anyio.to_thread.run_sync(server.start)
        options = server.options
        settings = secured(
            f"localhost:{server.port}",
            options.cert_file_path,
            api_key=KEY,
            policy_root="conformance",
        )
        report = await examine(settings)
        assert {each.level for each in report.findings} == {Level.OK}
        assert {"dns", "certificate", "clock", "policies"} <= {
            each.id for each in report.findings
        }
        assert KEY not in json.dumps(report.as_dict())

        for change, wanted in (
            ({"api_key": "wrong"}, "api-key-refused"),
            ({"api_key": None}, "api-key-missing"),
            ({"policy_root": "nothing"}, "policy-root-missing"),
            ({"policy_path": "conformance.nothing"}, "policy-missing"),
            ({"cert_file_path": None}, "certificate-unknown-ca"),
        ):
            report = await examine(attrs.evolve(settings, **change))
            assert problems(report) == {wanted}
        plain = attrs.evolve(settings, insecure=True, cert_file_path=None)
        assert problems(await examine(plain)) == {"tls-expected"}


async def test_a_topaz_that_is_paused_or_gone_is_named(tmp_path):
    with Topazd([REAL], tmp_path) as server:
        await anyio.to_thread.run_sync(server.start)
        settings = secured(server.options.url, None, insecure=True, timeout=1.0)
        await anyio.to_thread.run_sync(server.freeze)
        assert problems(await examine(settings)) == {"server-silent"}
        await anyio.to_thread.run_sync(server.thaw)
    settings = attrs.evolve(settings, timeout=PATIENCE)
    assert problems(await examine(settings)) == {"tcp-refused"}
