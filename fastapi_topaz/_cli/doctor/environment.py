"""Checks of this Python environment. They need no network."""

from __future__ import annotations

import platform
import re
import ssl
from importlib.metadata import (
    PackageNotFoundError,
    packages_distributions,
    requires,
    version,
)
from typing import TYPE_CHECKING, Final

import grpc
import grpc.aio

from fastapi_topaz._cli.doctor.findings import Finding, found
from fastapi_topaz._distribution import DISTRIBUTION


if TYPE_CHECKING:
    from collections.abc import Iterator


__all__ = ["environment_findings"]


_SHOWN: Final = ("anyio", "grpcio", "protobuf", "trio")

_PATCHERS: Final = (
    "ddtrace",
    "elastic-apm",
    "gevent",
    "newrelic",
    "opentelemetry-instrumentation-grpc",
    "scout-apm",
    "sentry-sdk",
)
"""Distributions that replace functions of gRPC, or of what it is built on."""

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?>=([0-9.]+)$")


def environment_findings(name: str = "fastapi_topaz") -> list[Finding]:
    """Return what is found about the package *name* and the libraries below it."""
    return [*_versions(), *_owners(name), *_patches()]


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    shown = [f"{each} {_installed(each) or 'not installed'}" for each in _SHOWN]
    yield found(
        "versions",
        f"{DISTRIBUTION} {_installed(DISTRIBUTION) or 'not installed'}, Python "
        f"{platform.python_version()}, {ssl.OPENSSL_VERSION.partition('  ')[0]}, "
        f"{', '.join(shown)}",
    )
    try:
        wanted = requires(DISTRIBUTION) or []
    except PackageNotFoundError:  # run from its sources
        wanted = []
    for requirement in wanted:
        match = _REQUIREMENT.fullmatch(requirement)  # not those of an extra
        if match is None:
            continue
        name, least = match.groups()
        have = _installed(name)
        if have is None or numbers(have) < numbers(least):
            yield found(
                "version-too-old",
                f"{name} {have or 'is not installed'}, but {DISTRIBUTION} needs "
                f"{least} or newer",
            )


def numbers(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, without zeros at the end."""
    parts = [int(each) for each in re.match(r"[\d.]*", text)[0].split(".") if each]  # type: ignore[index]
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def _owners(name: str) -> Iterator[Finding]:
    others = sorted({*packages_distributions().get(name, ())} - {DISTRIBUTION})
    if others:
        listed = ", ".join(f"{each} {_installed(each)}" for each in others)
        yield found(
            "second-distribution",
            f"{listed} also installs the import name {name}; Python imports "
            "whichever comes first",
        )
    else:
        yield found("distribution", f"only {DISTRIBUTION} owns the import name {name}")


def _patches() -> Iterator[Finding]:
    active = sorted(_replaced())
    installed = [each for each in _PATCHERS if _installed(each) is not None]
    if active:
        yield found(
            "grpc-patched", f"functions of gRPC are replaced by: {', '.join(active)}"
        )
    elif installed:
        listed = ", ".join(installed)
        said = f"no function of gRPC is replaced, but installed: {listed}"
        yield found("grpc-patches", said)
    else:
        yield found("grpc-patches", "no library that replaces functions of gRPC")


def _replaced() -> Iterator[str]:
    """Yield the packages whose code stands where a function of gRPC was."""
    for module in (grpc, grpc.aio):
        for name in ("insecure_channel", "secure_channel", "server"):
            function = getattr(module, name)
            owner = (getattr(function, "__module__", None) or "").partition(".")[0]
            if owner != "grpc" or hasattr(function, "__wrapped__"):
                yield owner or "unknown"
