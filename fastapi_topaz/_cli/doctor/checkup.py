"""
Runs all checks.

A check is a coroutine function that takes the `Checkup`, adds findings, and keeps what
later checks need. No check raises because something is broken: it adds a finding, and
later checks do what is still possible.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import anyio
from anyio import to_thread

from fastapi_topaz._cli.doctor.authorizer import ask_authorizer
from fastapi_topaz._cli.doctor.context import Checkup, Settings
from fastapi_topaz._cli.doctor.environment import environment_findings
from fastapi_topaz._cli.doctor.findings import Report, found
from fastapi_topaz._cli.doctor.network import (
    check_addresses,
    check_configuration,
    check_dns,
    check_files,
)
from fastapi_topaz._cli.doctor.tls import route_to


if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from fastapi_topaz._http2.addresses import Address

    Check: TypeAlias = Callable[[Checkup], Awaitable[None]]


__all__ = ["CHECKS", "examine"]


_STEPS: Final = 30
"""The most steps of one check, each of which has the time limit of the settings."""


async def check_environment(checkup: Checkup) -> None:
    """Check this Python environment."""
    checkup.add(*await to_thread.run_sync(environment_findings))


async def check_servers(checkup: Checkup) -> None:
    """Check TLS, the protocol and the Authorizer at each address, all in parallel."""
    if not checkup.reached:
        said = "TLS, the Authorizer and its policies: no connection to the server"
        checkup.add(found("not-checked", said))
        return
    found_by = {address: Checkup(checkup.settings) for address in checkup.reached}
    async with anyio.create_task_group() as servers:
        for address, own in found_by.items():
            for name in ("target", "has_credentials", "endpoint", "context"):
                setattr(own, name, getattr(checkup, name))
            servers.start_soon(_check_server, own, address)
    # In the order of the addresses, not of their answers.
    for address in checkup.addresses:
        if address in found_by:
            checkup.add(*found_by[address].findings)


async def _check_server(checkup: Checkup, address: Address) -> None:
    async def check(checkup: Checkup) -> None:
        route = await route_to(checkup, address)
        if route is None:
            said = "the Authorizer, its limits, its clock and its policies"
            checkup.add(found("not-checked", said, address.text))
        else:
            await ask_authorizer(checkup, address, route)

    await _bounded(check, checkup, f"the check of {address.text}")


CHECKS: Final[Sequence[Check]] = (
    check_environment,
    check_configuration,
    check_files,
    check_dns,
    check_addresses,
    check_servers,
)
"""The checks, in their order."""


async def examine(
    settings: Settings,
    *,
    checks: Sequence[Check] = CHECKS,
    progress: Callable[[str], object] = lambda _name: None,
) -> Report:
    """
    Run all checks, and return what they found.

    Args:
        settings: What to check.
        checks: The checks.
        progress: Called with the name of each check before it begins.
    """
    checkup = Checkup(settings)
    for check in checks:
        name = getattr(check, "__name__", "check").removeprefix("check_")
        progress(name)
        await _bounded(check, checkup, f"the check of {name}")
    target = "" if checkup.target is None else checkup.target.url
    return Report.of(target, checkup.findings)


async def _bounded(check: Check, checkup: Checkup, what: str) -> None:
    limit = _STEPS * checkup.settings.timeout
    try:
        with anyio.fail_after(limit):
            await check(checkup)
    except TimeoutError:
        checkup.add(found("check-timeout", f"{what} took longer than {limit:g} s"))
    except Exception as error:  # noqa: BLE001  (one fault must not hide the rest)
        # Without its text, which may hold a secret.
        said = f"{what} failed: {type(error).__name__}"
        checkup.add(found("check-failed", said))
