"""
The command line: the commands with their options.

Each command imports its work when it runs, because each needs other libraries.
"""

import contextlib
from collections.abc import Iterator
from importlib.metadata import version as installed
from typing import Annotated

import typer

from fastapi_topaz._cli.options import (
    ApiKey,
    AppConfig,
    AsJson,
    Backend,
    Cert,
    ClientCert,
    ClientKey,
    ExistingCert,
    Insecure,
    MaybeInsecure,
    ServerName,
    TenantId,
    Url,
    installed_backend,
    on_command_line,
    positive,
)
from fastapi_topaz._distribution import DISTRIBUTION


__all__ = ["commands"]


commands = typer.Typer(
    help="A pool of gRPC connections to the Topaz authorizer for FastAPI.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{DISTRIBUTION} {installed(DISTRIBUTION)}")
        raise typer.Exit


@commands.callback()
def _root(
    *,
    _version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    pass


@commands.command()
def demo(
    *,
    url: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of a Topaz; without it one is embedded."),
    ] = None,
    cert: ExistingCert = None,
    insecure: Insecure = False,
    api_key: ApiKey = None,
    policy_root: Annotated[
        str, typer.Option(help="The package that all policies are below.")
    ] = "myapp",
    requests: Annotated[int, typer.Option(min=1, help="Requests to send.")] = 2000,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Requests under way at once.")
    ] = 50,
    streams: Annotated[
        int, typer.Option(min=1, help="streams_per_connection of the pool.")
    ] = 1,
    faults: Annotated[
        bool | None,
        typer.Option(
            "--faults/--no-faults",
            help="Whether to let the embedded Topaz restart, freeze and be overloaded "
            "afterwards, for about 8 s. Default: yes, if it is embedded.",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[
        Backend, typer.Option(help="asyncio is uvicorn, trio is hypercorn.")
    ] = Backend.ASYNCIO,
) -> None:
    """
    Send HTTP requests to a guarded FastAPI application and print what the pool did.

    Ends with 0 only if every request was answered as it should be.
    """
    from fastapi_topaz._authorizer.options import AuthorizerOptions  # noqa: PLC0415
    from fastapi_topaz._cli.demo_command import Show, show_demo  # noqa: PLC0415

    if url is None and (cert is not None or insecure):
        raise typer.BadParameter("--cert and --insecure need --url")
    if url is not None and faults:
        raise typer.BadParameter("--faults need the embedded Topaz, without --url")
    options = None
    if url is not None:
        try:
            options = AuthorizerOptions(
                url=url,
                cert_file_path=None if cert is None else str(cert),
                insecure=insecure,
                api_key=api_key,
            )
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    show = Show(
        options=options,
        policy_root=policy_root,
        requests=requests,
        concurrency=concurrency,
        streams=streams,
        has_faults=url is None if faults is None else faults,
    )
    raise typer.Exit(show_demo(show, backend))


@commands.command()
def doctor(
    context: typer.Context,
    app_config: AppConfig = None,
    *,
    url: Url = "localhost:8282",
    cert: Cert = None,
    insecure: MaybeInsecure = False,
    api_key: ApiKey = None,
    tenant_id: TenantId = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    server_name: ServerName = None,
    policy_root: Annotated[
        str | None,
        typer.Option(help="The package that all policies should be below."),
    ] = None,
    policy_path: Annotated[
        str | None, typer.Option(help="A policy that should exist.")
    ] = None,
    streams: Annotated[
        int, typer.Option(min=1, help="streams_per_connection of the pool.")
    ] = 1,
    timeout: Annotated[
        float, typer.Option(help="Seconds for each step.", callback=positive)
    ] = 3.0,
    as_json: AsJson = False,
    backend: Annotated[
        Backend,
        typer.Option(help="The event loop of the checks.", callback=installed_backend),
    ] = Backend.ASYNCIO,
) -> None:
    """
    Check the way to a Topaz, from DNS to policies, and say what to do.

    Ends with 0 if all is well, with 1 if there is a problem, with 2 if
    MODULE:ATTRIBUTE cannot be imported. It prints no key.
    """
    from fastapi_topaz._cli.doctor.context import Settings  # noqa: PLC0415
    from fastapi_topaz._cli.doctor_command import diagnose, merged  # noqa: PLC0415
    from fastapi_topaz._cli.imported import settings_in  # noqa: PLC0415

    settings = Settings(
        url=url,
        cert_file_path=cert,
        insecure=insecure,
        api_key=api_key,
        tenant_id=tenant_id,
        client_cert_path=client_cert,
        client_key_path=client_key,
        server_name=server_name,
        policy_root=policy_root,
        policy_path=policy_path,
        streams=streams,
        timeout=timeout,
    )
    if app_config is not None:
        with _reporting():
            theirs = settings_in(app_config)
        settings = merged(settings, theirs, on_command_line(context))
    raise typer.Exit(diagnose(settings, as_json=as_json, backend=backend))


@commands.command()
def routes(
    app: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:ATTRIBUTE",
            help="The FastAPI application, such as main:app, or a function that "
            "returns it.",
        ),
    ],
    *,
    as_json: AsJson = False,
) -> None:
    """
    Print the routes of an application, with the policy paths that their guards ask.

    Asks no Topaz. Ends with 0, or with 2 if the application cannot be imported.
    """
    from fastapi_topaz._cli.imported import routes_in  # noqa: PLC0415
    from fastapi_topaz._cli.routes_command import show_routes  # noqa: PLC0415

    with _reporting():
        found = routes_in(app)
    raise typer.Exit(show_routes(found, as_json=as_json))


@contextlib.contextmanager
def _reporting() -> Iterator[None]:
    """End with a line and the exit code 2 if an object cannot be imported."""
    from fastapi_topaz._cli.imported import CannotImport  # noqa: PLC0415

    try:
        yield
    except CannotImport as error:
        # Not as wrong usage: typer would wrap the line.
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None


@commands.command()
def load(
    *,
    url: Url = "localhost:8282",
    cert: Cert = None,
    insecure: Insecure = False,
    api_key: ApiKey = None,
    tenant_id: TenantId = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    server_name: ServerName = None,
    policy_path: Annotated[
        str | None,
        typer.Option(help="The policy to ask, anonymously. Without it: calls Info."),
    ] = None,
    duration: Annotated[
        float, typer.Option(max=3600, help="Seconds.", callback=positive)
    ] = 10.0,
    rate: Annotated[
        float | None,
        typer.Option(
            max=100_000,
            help="Calls that begin per second. Without it: as many as --concurrency "
            "allows.",
            callback=positive,
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10_000,
            help="The most calls at once. Default: no limit with --rate, otherwise 10.",
            show_default=False,
        ),
    ] = None,
    connections: Annotated[
        int, typer.Option(min=1, max=1000, help="max_connections of the pool.")
    ] = 10,
    streams: Annotated[
        int,
        typer.Option(min=1, max=1000, help="streams_per_connection of the pool."),
    ] = 1,
    check_timeout: Annotated[
        float, typer.Option(max=600, help="Seconds for each call.", callback=positive)
    ] = 5.0,
    allow_remote: Annotated[
        bool,
        typer.Option(
            "--allow-remote", help="Permit to load another machine than this one."
        ),
    ] = False,
    as_json: AsJson = False,
    backend: Annotated[
        Backend,
        typer.Option(help="The event loop of the pool.", callback=installed_backend),
    ] = Backend.ASYNCIO,
) -> None:
    """
    Load a Topaz on this machine through a pool, and show rate, latency and the pool.

    Ends with 0 if each call was answered, with 1 if one failed, with 3 if --rate was
    not reached, with 130 after Ctrl-C.
    """
    from fastapi_topaz._authorizer.options import AuthorizerOptions  # noqa: PLC0415
    from fastapi_topaz._cli.load import Plan  # noqa: PLC0415
    from fastapi_topaz._cli.load_command import (  # noqa: PLC0415
        LoadSettings,
        load_test,
    )

    try:
        options = AuthorizerOptions(
            url=url,
            cert_file_path=cert,
            insecure=insecure,
            api_key=api_key,
            tenant_id=tenant_id,
            client_cert_path=client_cert,
            client_key_path=client_key,
            server_name=server_name,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    settings = LoadSettings(
        options=options,
        plan=Plan(duration=duration, concurrency=concurrency, rate=rate),
        policy_path=policy_path,
        check_timeout=check_timeout,
        connections=connections,
        streams=streams,
        allows_remote=allow_remote,
        as_json=as_json,
    )
    raise typer.Exit(load_test(settings, backend))
