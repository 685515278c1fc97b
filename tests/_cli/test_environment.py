"""Test what `doctor` finds about the Python environment."""

from __future__ import annotations

import grpc
import pytest

from fastapi_topaz._cli.doctor import environment as _environment
from fastapi_topaz._cli.doctor.environment import environment_findings, numbers
from fastapi_topaz._cli.doctor.findings import Level


def found():
    return {each.id: each for each in environment_findings()}


def install(monkeypatch, distribution, version):
    """Let *distribution* have this version, or none."""
    usual = _environment._installed

    def installed(name):
        return version if name == distribution else usual(name)

    monkeypatch.setattr(_environment, "_installed", installed)


def test_the_versions_are_listed():
    summary = found()["versions"].summary
    for name in ("fastapi-topaz-pool", "Python", "OpenSSL", "anyio", "grpcio"):
        assert f"{name} " in summary


def test_this_environment_has_no_problem():
    assert all(each.level is not Level.PROBLEM for each in environment_findings())


def test_a_second_distribution_of_the_import_name_is_a_problem(tmp_path, monkeypatch):
    info = tmp_path / "fastapi_topaz-2.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: fastapi-topaz\nVersion: 2.0.1\n")
    (info / "top_level.txt").write_text("fastapi_topaz\n")
    (info / "RECORD").write_text("fastapi_topaz/__init__.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)

    finding = found()["second-distribution"]

    assert finding.level is Level.PROBLEM
    assert "fastapi-topaz 2.0.1" in finding.summary
    assert "pip uninstall -y fastapi-topaz" in finding.remedy
    assert "distribution" not in found()


@pytest.mark.parametrize("have, is_old", [("1.79.1", True), ("1.80.0", False)])
def test_a_dependency_below_its_lower_bound_is_a_problem(have, is_old, monkeypatch):
    install(monkeypatch, "grpcio", have)
    old = found().get("version-too-old")

    assert (old is not None) is is_old
    if old is not None:
        assert old.level is Level.PROBLEM
        assert old.summary.startswith(
            "grpcio 1.79.1, but fastapi-topaz-pool needs 1.80"
        )
        assert "pip install -U" in old.remedy


def test_a_missing_dependency_is_a_problem(monkeypatch):
    install(monkeypatch, "anyio", None)
    assert found()["version-too-old"].summary.startswith("anyio is not installed")


def test_a_library_that_replaced_a_function_of_grpc_is_a_warning(monkeypatch):
    def channel(target):
        raise NotImplementedError

    channel.__module__ = "ddtrace.contrib.grpc"
    monkeypatch.setattr(grpc, "insecure_channel", channel)

    finding = found()["grpc-patched"]

    assert finding.level is Level.WARNING
    assert "ddtrace" in finding.summary
    assert "transport='grpcio'" in finding.remedy


def test_an_installed_library_that_replaced_nothing_is_only_named(monkeypatch):
    install(monkeypatch, "ddtrace", "1")
    finding = found()["grpc-patches"]

    assert finding.level is Level.OK
    assert "ddtrace" in finding.summary


@pytest.mark.parametrize(
    "text, wanted",
    [("1.80.0", (1, 80)), ("4.16.0rc1", (4, 16)), ("2", (2,)), ("x", ())],
)
def test_numbers_of_a_version(text, wanted):
    assert numbers(text) == wanted
