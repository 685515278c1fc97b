"""The command line of the demo, and the tables that it prints at the end."""

import contextlib
import enum
import logging
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version as installed
from pathlib import Path
from typing import Annotated, Self

import anyio
import attrs
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from fastapi_topaz._app.config import TopazConfig
from fastapi_topaz._authorizer.options import AuthorizerOptions
from fastapi_topaz._authorizer.pool import ConnectionPool
from fastapi_topaz._cli.demo import (
    DemoFailed,
    Tally,
    application,
    identity_of,
    policies,
    send,
    serving,
)
from fastapi_topaz._distribution import DISTRIBUTION
from fastapi_topaz.testing import EmbeddedAuthorizer


__all__ = ["commands"]


# Columns of output without a terminal, such as a pipe or a log file.
WIDTH = 100


# -- the options --------------------------------------------------------------------


class Backend(enum.StrEnum):
    """The event loop of the application."""

    ASYNCIO = "asyncio"
    TRIO = "trio"


Url = Annotated[
    str | None, typer.Option(help="HOST:PORT of a Topaz; without it one is embedded.")
]
Cert = Annotated[
    Path | None,
    typer.Option(
        help="PEM file of the CA of that Topaz.",
        exists=True,
        dir_okay=False,
        readable=True,
    ),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Talk to that Topaz without TLS.")
]
ApiKey = Annotated[
    str | None, typer.Option(help="API key of that Topaz.", envvar="TOPAZ_API_KEY")
]
PolicyRoot = Annotated[
    str, typer.Option(help="The package that all policies are below.")
]
Requests = Annotated[int, typer.Option(min=1, help="Requests to send.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests under way at once.")]
Streams = Annotated[
    int, typer.Option(min=1, help="streams_per_connection of the pool.")
]
On = Annotated[Backend, typer.Option(help="asyncio is uvicorn, trio is hypercorn.")]


# -- the commands -------------------------------------------------------------------


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
    url: Url = None,
    cert: Cert = None,
    insecure: Insecure = False,
    api_key: ApiKey = None,
    policy_root: PolicyRoot = "myapp",
    requests: Requests = 2000,
    concurrency: Concurrency = 50,
    streams: Streams = 1,
    backend: On = Backend.ASYNCIO,
) -> None:
    """
    Send HTTP requests to a guarded FastAPI application and print what the pool did.

    Ends with 0 only if every request was answered as it should be.
    """
    if url is None and (cert is not None or insecure):
        raise typer.BadParameter("--cert and --insecure need --url")
    authorizer = EmbeddedAuthorizer(policies(policy_root)) if url is None else None
    with Causes() as causes, authorizer or contextlib.nullcontext():
        try:
            options = (
                AuthorizerOptions(
                    url=url or "",
                    cert_file_path=None if cert is None else str(cert),
                    insecure=insecure,
                    api_key=api_key,
                )
                if authorizer is None
                else authorizer.options
            )
            config = TopazConfig(
                authorizer_options=options,
                policy_path_root=policy_root,
                identity_provider=identity_of,
                connection_pool=ConnectionPool(streams_per_connection=streams),
            )
            anyio.run(_open_and_close, config.connection_pool)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        _run(config, authorizer, causes, requests, concurrency, backend)


async def _open_and_close(pool: ConnectionPool) -> None:
    # Opens the pool early, so that a wrong certificate file is reported as wrong usage.
    async with pool:
        pass


def _run(
    config: TopazConfig,
    authorizer: EmbeddedAuthorizer | None,
    causes: "Causes",
    requests: int,
    concurrency: int,
    backend: Backend,
) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    strict = authorizer is not None
    who = "the embedded authorizer" if strict else config.authorizer_options.url
    _say(console, f"{requests} requests on {backend}, guarded by {who}")
    try:
        with serving(application(config), backend) as base:
            tally = _traffic(console, base, requests, concurrency, strict)
            seen = None if authorizer is None else Seen.by(authorizer)
    except DemoFailed as error:
        _say(console, f"Failed: {error}", *causes.lines())
        raise typer.Exit(1) from error
    console.print(_results(tally, seen), _pool(tally))
    if tally.failed:
        _say(console, *_failures(tally, requests), *causes.lines())
        raise typer.Exit(1)


def _traffic(
    console: Console, base: str, requests: int, concurrency: int, strict: bool
) -> Tally:
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    bar = Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    )
    with bar:
        task = bar.add_task("Sending", total=requests)

        async def run() -> Tally:
            return await send(
                base,
                requests=requests,
                concurrency=concurrency,
                strict=strict,
                progress=lambda: bar.advance(task),
            )

        # On asyncio, whatever *backend* is: the application runs in another thread.
        return anyio.run(run)


# -- the output ---------------------------------------------------------------------


@attrs.frozen
class Seen:
    """The counts of the embedded authorizer."""

    accepted: int
    open: int
    checks: int

    @classmethod
    def by(cls, authorizer: EmbeddedAuthorizer) -> Self:
        """Read the numbers of *authorizer*."""
        return cls(
            authorizer.connections_accepted,
            authorizer.connections_open,
            authorizer.calls["Is"],
        )


class Causes(logging.Handler):
    """A log handler that collects warnings, so that they do not disturb the output."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._first: dict[str, str] = {}
        self._times: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        """Count the message, together with its error."""
        message = record.getMessage()
        error = record.exc_info[1] if record.exc_info else None
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if error is not None:
            message = f"{message.strip()}: {error}"
        # If the start fails, servers put a traceback into the text. Keep its last line.
        message = message.rstrip("\n'").rpartition("\n")[2]
        # Messages that differ only in numbers have the same cause.
        kind = re.sub(r"\d+(\.\d+)?", "0", message)
        self._first.setdefault(kind, message)
        self._times[kind] += 1

    def lines(self) -> Iterator[str]:
        """Yield a line with the most frequent message, if there is one."""
        for kind, _ in self._times.most_common(1):
            yield f"Cause: {self._first[kind]}"

    def __enter__(self) -> Self:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)


def _results(tally: Tally, seen: Seen | None) -> Table:
    table = Table("Result", title="Traffic", title_justify="left")
    table.add_column(justify="right")
    rows = {
        "requests": tally.requests,
        "allowed (200)": tally.allowed,
        "denied (403)": tally.denied,
        "failed": tally.failed,
        "requests per second": f"{tally.rate:.0f}",
        "latency p50": _ms(tally.percentile(0.50)),
        "latency p99": _ms(tally.percentile(0.99)),
        "TCP connections accepted": "n/a" if seen is None else seen.accepted,
        "TCP connections open": "n/a" if seen is None else seen.open,
        "checks answered": "n/a" if seen is None else seen.checks,
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _ms(seconds: float) -> str:
    return "n/a" if math.isnan(seconds) else f"{seconds * 1000:.1f} ms"


def _pool(tally: Tally) -> Table:
    table = Table("Pool", title="Pool, as /health shows it", title_justify="left")
    for name in ("status", "total", "idle", "busy", "healthy", "max", "streams"):
        table.add_column(name, justify="right")
    healths = {"halfway": tally.halfway, "afterwards": tally.afterwards}
    for moment, health in healths.items():
        if health is None:
            continue
        pool = health["connection_pool"]
        names = ("total", "idle", "busy", "healthy", "max")
        streams = f"{pool['streams']}/{pool['streams_max']}"
        numbers = (str(pool[name]) for name in names)
        table.add_row(moment, health["status"], *numbers, streams)
    return table


def _failures(tally: Tally, requests: int) -> Iterator[str]:
    if tally.requests < requests:
        yield f"Gave up after {tally.requests} of {requests} requests: all had failed."
    for failure, times in tally.failures.most_common(3):
        yield f"Failed: {times} x {failure}"


def _say(console: Console, *lines: str) -> None:
    # Without markup and wrapping: a cause may be long, and may contain brackets that
    # rich would interpret.
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
