"""The checks up to an open TCP connection: options, files, DNS and addresses."""

from __future__ import annotations

import os
import re
import socket
from typing import TYPE_CHECKING, Any, Final

import anyio
import attrs
from anyio import to_thread

from fastapi_topaz._authorizer.options import AuthorizerOptions
from fastapi_topaz._authorizer.rego import check_reference
from fastapi_topaz._cli.doctor.findings import Level, found
from fastapi_topaz._cli.doctor.wire import dial
from fastapi_topaz._http2.addresses import parse
from fastapi_topaz._http2.tls import tls_context
from fastapi_topaz._rpc.loopback import is_loopback
from fastapi_topaz.exceptions import ConnectFailed


if TYPE_CHECKING:
    from fastapi_topaz._cli.doctor.context import Checkup, Settings
    from fastapi_topaz._cli.doctor.findings import Finding
    from fastapi_topaz._http2.addresses import Address


__all__ = ["check_addresses", "check_configuration", "check_dns", "check_files"]


MOST_ADDRESSES: Final = 16
"""The most addresses of one name that are checked."""

_ESSENTIAL = {"url", "insecure"}

_POLICY_PATH = (
    "--policy-path is the package of a policy, without the decision. If the root is "
    "myapp, the route GET /orders/{id} asks myapp.GET.orders.__id."
)
_NO_SECOND_LINE = "Pass it without line breaks and other signs that are not printable."
_BOTH = "Pass both --client-cert and --client-key, or neither."
_OPTIONS: Final = {
    "url": "--url is host:port without a scheme, such as localhost:8282.",
    "policy_root": "--policy-root is the first part of all packages, such as myapp.",
    "policy_path": _POLICY_PATH,
    "api_key": _NO_SECOND_LINE,
    "tenant_id": _NO_SECOND_LINE,
    "server_name": "--server-name is a host name or an IP address, without a port.",
    "client_cert_path": _BOTH,
    "client_key_path": _BOTH,
}
"""What a value of these options must be."""

_WITHOUT_TLS = "Drop --insecure (insecure=True), or drop the options of TLS."


async def check_configuration(checkup: Checkup) -> None:
    """Check the options, as the pool does when it is configured."""
    settings = checkup.settings
    options, faults = _options(settings)
    is_complete = not faults
    for name in ("policy_root", "policy_path"):
        value = getattr(settings, name)
        try:
            if value is not None:
                check_reference(name, value)
        except ValueError as error:
            faults.append(str(error))
            without: dict[str, Any] = {name: None}
            checkup.settings = attrs.evolve(checkup.settings, **without)
    if options is not None:
        try:
            checkup.endpoint = parse(options.url)
        except ValueError as error:
            faults.append(f"url={options.url!r} cannot be used: {error}")
        else:
            checkup.target = options.target
            checkup.has_credentials = is_complete
    for fault in faults:
        checkup.add(found("configuration-invalid", fault, facts=_rule(fault)))
    if not faults and options is not None:
        source = "" if settings.source is None else f", from {settings.source}"
        checkup.add(found("configuration", f"{_described(options)}{source}"))
    sent = "the API key is" if settings.api_key else "the metadata are"
    secret = settings.api_key or settings.extra_metadata or settings.credentials
    if secret and settings.insecure and not is_loopback(settings.url):
        said = f"{sent} sent to that server without TLS"
        checkup.add(found("key-in-plaintext", said))


def _rule(fault: str) -> str:
    """Return what the option that the message *fault* begins with must be."""
    if "exclude each other" in fault:
        return _WITHOUT_TLS
    name = re.match(r"\w+", fault)
    return _OPTIONS.get(name[0], "") if name is not None else ""


def _options(settings: Settings) -> tuple[AuthorizerOptions | None, list[str]]:
    """Return the options that can be used, and what is wrong with the others."""
    names = {field.name for field in attrs.fields(AuthorizerOptions)}
    given: dict[str, Any] = {
        field.name: getattr(settings, field.name)
        for field in attrs.fields(type(settings))
        if field.name in names
    }
    try:
        return AuthorizerOptions(**given), []
    except (TypeError, ValueError) as error:
        faults = [str(error)]
    try:
        # Enough to check the network, also if another option is wrong.
        usable = {name: given[name] for name in _ESSENTIAL}
        return AuthorizerOptions(**usable), faults
    except (TypeError, ValueError):
        return None, faults


def _described(options: AuthorizerOptions) -> str:
    security = "without TLS" if options.insecure else "with TLS"
    key = "with an API key" if options.api_key else "without an API key"
    return f"{options.url}, {security}, {key}"


async def check_files(checkup: Checkup) -> None:
    """Check the files with certificates, and make the TLS settings of the pool."""
    target = checkup.target
    if target is None or target.insecure:
        return
    while checkup.context is None:
        try:
            checkup.context = await to_thread.run_sync(tls_context, target)
        except (ValueError, ConnectFailed) as error:
            checkup.add(found("certificate-file-unusable", str(error)))
            if "client_" not in str(error) or target.client_cert_path is None:
                return
            # The other file may still be good.
            checkup.target = target = attrs.evolve(
                target, client_cert_path=None, client_key_path=None
            )


async def check_dns(checkup: Checkup) -> None:
    """Find the addresses of the host."""
    endpoint, limit = checkup.endpoint, checkup.settings.timeout
    if endpoint is None:
        return
    try:
        with anyio.fail_after(limit):
            addresses = await endpoint.resolve()
    except TimeoutError:
        said = f"the host {endpoint.host} was not resolved within {limit:g} s"
        checkup.add(found("dns-timeout", said))
    except OSError as error:
        said = f"the host {endpoint.host} cannot be resolved ({_reason(error)})"
        checkup.add(found("dns-failed", said))
    else:
        checkup.addresses = addresses[:MOST_ADDRESSES]
        listed = ", ".join(each.text for each in checkup.addresses)
        said = f"{endpoint.host} leads to {listed}"
        if not endpoint.addresses:
            checkup.add(found("dns", said))


async def check_addresses(checkup: Checkup) -> None:
    """Connect to each address, all at the same time."""
    failures: list[Finding] = []
    limit = checkup.settings.timeout

    async def attempt(address: Address) -> None:
        try:
            with anyio.fail_after(limit):
                async with await dial(address):
                    pass
        except TimeoutError:
            said = f"no answer to a connection attempt within {limit:g} s"
            failures.append(found("tcp-timeout", said, address.text))
        except ConnectionResetError:  # reached, and closed at once
            checkup.reached.append(address)
        except OSError as error:
            failures.append(_failed(error, address))
        else:
            checkup.reached.append(address)

    async with anyio.create_task_group() as attempts:
        for address in checkup.addresses:
            attempts.start_soon(attempt, address)
    if checkup.reached:
        accepting = [address.text for address in checkup.reached]
        checkup.add(found("tcp", "the port accepts connections", *accepting))
        # The pool uses the other addresses, so the application works.
        failures = [attrs.evolve(each, level=Level.WARNING) for each in failures]
    checkup.add(*failures)


def _failed(error: OSError, address: Address) -> Finding:
    if isinstance(error, ConnectionRefusedError):
        said = "nothing listens there (connection refused)"
        return found("tcp-refused", said, address.text)
    if isinstance(error, TimeoutError):
        said = "no answer to a connection attempt"
        return found("tcp-timeout", said, address.text)
    return found("tcp-failed", f"cannot connect: {_reason(error)}", address.text)


def _reason(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return str(error.args[-1])
    return os.strerror(error.errno) if error.errno else type(error).__name__
