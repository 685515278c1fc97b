"""The options that several commands have, and their checks."""

from __future__ import annotations

import enum
import importlib
import math
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer


__all__ = [
    "ApiKey",
    "AppConfig",
    "AsJson",
    "Backend",
    "Cert",
    "ClientCert",
    "ClientKey",
    "Insecure",
    "MaybeInsecure",
    "ServerName",
    "TenantId",
    "Url",
    "installed_backend",
    "on_command_line",
    "positive",
]


class Backend(enum.StrEnum):
    """An event loop."""

    ASYNCIO = "asyncio"
    TRIO = "trio"


def installed_backend(backend: Backend) -> Backend:
    """
    Return *backend*, if its library is installed.

    Raises:
        ModuleNotFoundError: It is not. anyio would raise a LookupError later.
    """
    importlib.import_module(backend)
    return backend


def positive(value: float | None) -> float | None:
    """
    Return *value* if it is None, or a finite number above 0.

    Raises:
        typer.BadParameter: It is not.
    """
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is not a finite number above 0")
    return value


Url: TypeAlias = Annotated[str, typer.Option(help="HOST:PORT of Topaz's authorizer.")]
Cert: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="PEM file of the CA of that Topaz."),
]
Insecure: TypeAlias = Annotated[
    bool, typer.Option("--insecure", help="Talk to that Topaz without TLS.")
]
MaybeInsecure: TypeAlias = Annotated[
    bool, typer.Option(help="Talk to that Topaz without TLS.")
]
AppConfig: TypeAlias = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODULE:ATTRIBUTE]",
        help="The TopazConfig or AuthorizerOptions of an application, such as "
        "main:config, or a function that returns one. Options take precedence.",
        show_default=False,
    ),
]
ApiKey: TypeAlias = Annotated[
    str | None, typer.Option(help="API key of that Topaz.", envvar="TOPAZ_API_KEY")
]
TenantId: TypeAlias = Annotated[
    str | None, typer.Option(help="Id of the tenant.", envvar="TOPAZ_TENANT_ID")
]
ClientCert: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="PEM file of the client certificate (mTLS)."),
]
ClientKey: TypeAlias = Annotated[
    str | None, typer.Option(metavar="PATH", help="PEM file of its private key.")
]
ServerName: TypeAlias = Annotated[
    str | None,
    typer.Option(help="The name that the server's certificate must be for."),
]
AsJson: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print one JSON object and nothing else.")
]
ExistingCert: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help="PEM file of the CA of that Topaz.",
        exists=True,
        dir_okay=False,
        readable=True,
    ),
]


def on_command_line(context: typer.Context) -> dict[str, Any]:
    """Return the values that were given on the command line, by their parameters."""
    return {
        name: value
        for name, value in context.params.items()
        if (source := context.get_parameter_source(name)) is not None
        and source.name == "COMMANDLINE"
    }
