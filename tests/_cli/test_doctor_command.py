"""Test the output and the exit code of `doctor`, as users run it."""

from __future__ import annotations

import io
import json
import sys

import pytest
from rich.console import Console

from fastapi_topaz._cli import doctor_command as _doctor_command
from fastapi_topaz._cli.doctor.findings import CATALOGUE, Report, found
from fastapi_topaz.testing import EmbeddedAuthorizer
from kit.secrets import KEY


pytestmark = pytest.mark.real_clock

BACKENDS = ["asyncio", "trio"]
POLICIES = {"myapp.GET.documents": True}


def printed(report):
    console = Console(width=100)
    with console.capture() as capture:
        _doctor_command.show(console, report)
    return capture.get()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_healthy_authorizer_gives_exit_code_0(backend, run_forked):
    with EmbeddedAuthorizer(POLICIES, tls=True, api_key=KEY) as topaz:
        ended = run_forked(
            *("doctor", "--url", topaz.url, "--cert", topaz.ca_cert_path),
            *("--policy-root", "myapp", "--policy-path", "myapp.GET.documents"),
            *("--timeout", "20", "--backend", backend),
            TOPAZ_API_KEY=KEY,
        )

    assert (ended.code, ended.err) == (0, "")
    assert ended.out.endswith("\nNo problem found.\n")
    assert "Remedy" not in ended.out
    assert KEY not in ended.out


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_problem_gives_exit_code_1_and_its_remedy(backend, nobody, run_forked):
    ended = run_forked(
        *("doctor", "--url", nobody, "--api-key", KEY, "--backend", backend)
    )

    assert (ended.code, ended.err) == (1, "")
    assert "tcp-refused" in ended.out
    assert "Remedy: Start Topaz" in ended.out
    assert ended.out.endswith("\n1 problem found.\n")
    assert KEY not in ended.out


@pytest.mark.parametrize("backend", BACKENDS)
def test_json_is_the_whole_output(backend, nobody, run_forked):
    ended = run_forked(*("doctor", "--url", nobody, "--json", "--backend", backend))

    report = json.loads(ended.out)
    assert (ended.code, ended.err) == (1, "")
    assert (report["ok"], report["problems"]) == (False, 1)
    assert report["target"] == nobody
    [refused] = [each for each in report["findings"] if each["level"] == "problem"]
    assert refused["id"] == "tcp-refused"
    assert refused["addresses"] == [f"ipv4:{nobody}"]
    assert refused["remedy"] == CATALOGUE["tcp-refused"].remedy


def test_a_garbage_url_is_a_finding_and_no_wrong_usage(run_forked):
    ended = run_forked("doctor", "--url", f"user:{KEY}@topaz", "--json")

    assert ended.code == 1
    assert "configuration-invalid" in ended.out
    assert KEY not in ended.out


def test_findings_of_several_addresses_are_one_line():
    report = Report.of(
        "topaz:8282",
        [found("tcp-refused", "refused", "a"), found("tcp-refused", "refused", "b")],
    )
    assert report.problems == 1
    assert "a, b: refused." in printed(report)


def test_brackets_of_a_server_are_no_markup():
    assert "[red]x[/]" in printed(Report.of("", [found("certificate", "[red]x[/]")]))


def test_signs_that_a_terminal_cannot_show_are_replaced(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    report = Report.of("", [found("certificate", "issued by M\u00fcller")])
    _doctor_command.show(_doctor_command.new_console(), report)
    sys.stdout.flush()

    assert b"issued by M?ller" in raw.getvalue()


def test_several_problems_are_counted():
    findings = [found("tcp-refused", "refused"), found("dns-failed", "failed")]
    assert printed(Report.of("", findings)).endswith("\n2 problems found.\n")
