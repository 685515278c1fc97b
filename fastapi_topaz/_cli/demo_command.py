"""The command `demo`, and the tables that it prints at the end."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any, Self

import anyio
import attrs
import typer
from rich.console import Group
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from rich.text import Text

from fastapi_topaz._app.config import TopazConfig
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
from fastapi_topaz._cli.demo_faults import CHECK_TIMEOUT, ride, scenes
from fastapi_topaz._cli.output import Causes, ms, new_console, say
from fastapi_topaz.testing import EmbeddedAuthorizer


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console, RenderableType

    from fastapi_topaz._authorizer.options import AuthorizerOptions
    from fastapi_topaz._cli.demo_faults import Ride, Scene


__all__ = ["Show", "faults_table", "show_demo"]


@attrs.frozen(kw_only=True)
class Show:
    """
    What to show.

    Args:
        options: The Topaz to ask. None: an embedded one.
        policy_root: The package that all policies are below.
        requests: The requests to send.
        concurrency: The requests at once.
        streams: `streams_per_connection` of the pool.
        has_faults: Whether the embedded Topaz misbehaves afterwards.
    """

    options: AuthorizerOptions | None
    policy_root: str
    requests: int
    concurrency: int
    streams: int
    has_faults: bool


def show_demo(show: Show, backend: str) -> int:
    """
    Run the demo, and return the exit code.

    Raises:
        typer.BadParameter: A setting cannot be used.
    """
    rules = policies(show.policy_root)
    console = new_console()
    authorizer = EmbeddedAuthorizer(rules) if show.options is None else None
    with Causes() as causes, authorizer or contextlib.nullcontext():
        pool = ConnectionPool(streams_per_connection=show.streams)
        options = show.options if authorizer is None else authorizer.options
        try:
            config = _config(show, options, pool)
            anyio.run(_open_and_close, pool)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        code = _run(console, config, authorizer, causes, show, backend)
    if code or not show.has_faults:
        return code
    # A new authorizer and a new pool, so that the numbers above stay what they were.
    with Causes(), EmbeddedAuthorizer(rules) as stage:
        pool = ConnectionPool(streams_per_connection=10, connection_timeout=1)
        config = _config(show, stage.options, pool, check_timeout=CHECK_TIMEOUT)
        return _run_faults(console, config, stage, scenes(rules), backend)


def _config(show: Show, options: Any, pool: ConnectionPool, **more: Any) -> TopazConfig:
    return TopazConfig(
        authorizer_options=options,
        policy_path_root=show.policy_root,
        identity_provider=identity_of,
        connection_pool=pool,
        **more,
    )


async def _open_and_close(pool: ConnectionPool) -> None:
    # Opens the pool early, so that a wrong certificate file is reported as wrong usage.
    async with pool:
        pass


def _run(
    console: Console,
    config: TopazConfig,
    authorizer: EmbeddedAuthorizer | None,
    causes: Causes,
    show: Show,
    backend: str,
) -> int:
    strict = authorizer is not None
    who = "the embedded authorizer" if strict else config.authorizer_options.url
    say(console, f"{show.requests} requests on {backend}, guarded by {who}")
    try:
        with serving(application(config), backend) as base:
            tally = _traffic(console, base, show.requests, show.concurrency, strict)
            seen = None if authorizer is None else Seen.by(authorizer)
    except DemoFailed as error:
        say(console, f"Failed: {error}", *causes.lines())
        return 1
    console.print(_results(tally, seen), _pool(tally))
    if tally.failed:
        say(console, *_failures(tally, show.requests), *causes.lines())
        return 1
    return 0


def _run_faults(
    console: Console,
    config: TopazConfig,
    authorizer: EmbeddedAuthorizer,
    faults: Sequence[Scene],
    backend: str,
) -> int:
    """Show each of *faults*. The exit code is 1 if an answer was wrong."""
    rides: list[Ride] = []
    said = f"Three faults, with a check_timeout of {CHECK_TIMEOUT:g} s"
    say(console, "", said)
    try:
        with serving(application(config), backend) as base:
            for scene in faults:
                with contextlib.ExitStack() as showing:
                    if console.is_terminal:
                        showing.enter_context(console.status(scene.story))
                    rides.append(anyio.run(ride, base, scene, authorizer))
    except DemoFailed as error:
        say(console, f"Failed: {error}")
        return 1
    console.print(faults_table(rides, has_blocks=_has_blocks(console)))
    failed = [each for each in rides if each.wrong or math.isnan(each.recovered_after)]
    for each in failed:
        name = each.scene.name
        said = (
            f"{each.wrong} wrong answers" if each.wrong else "no good answer afterwards"
        )
        say(console, f"Failed: {name}: {said}")
    return 1 if failed else 0


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


def _results(tally: Tally, seen: Seen | None) -> Table:
    table = Table("Result", title="Traffic", title_justify="left")
    table.add_column(justify="right")
    rows = {
        "requests": tally.requests,
        "allowed (200)": tally.allowed,
        "denied (403)": tally.denied,
        "failed": tally.failed,
        "requests per second": f"{tally.rate:.0f}",
        "latency p50": ms(tally.percentile(0.50)),
        "latency p99": ms(tally.percentile(0.99)),
        "TCP connections accepted": "n/a" if seen is None else seen.accepted,
        "TCP connections open": "n/a" if seen is None else seen.open,
        "checks answered": "n/a" if seen is None else seen.checks,
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


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


# -- the faults ---------------------------------------------------------------------


_BLOCKS = " ▁▂▃▄▅▆▇█"
_PLAIN = " .:-=+*#@"


def _has_blocks(console: Console) -> bool:
    try:
        _BLOCKS.encode(console.encoding)
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def faults_table(rides: Sequence[Ride], *, has_blocks: bool = True) -> Group:
    """Return the counts of each scene, and below it a timeline of its answers."""
    table = Table("Fault", title="Faults", title_justify="left")
    names = ("sent", "answered", "503", "wrong", "slowest", "recovered after")
    for name in names:
        table.add_column(name, justify="right")
    for each in rides:
        counts = (len(each.answers), each.good, each.refused, each.wrong)
        times = (ms(each.slowest), ms(each.recovered_after))
        table.add_row(each.scene.name, *map(str, counts), *times)
    lines: list[RenderableType] = [table]
    for each in rides:
        lines += _timeline(each, _BLOCKS if has_blocks else _PLAIN)
    return Group(*lines)


def _timeline(ride: Ride, signs: str) -> Iterator[Text]:
    """Yield the lines of one scene. A column is a quarter of a second."""
    columns = ride.columns()
    most = max(1.0, *(max(good, other) for good, other in columns), 0.0)
    yield Text(f"\n{ride.scene.story}.")
    for number, (name, style) in enumerate((("answered", "green"), ("503", "red"))):
        heights = (
            math.ceil(each[number] / most * (len(signs) - 1)) for each in columns
        )
        bar = "".join(signs[height] for height in heights)
        yield Text(f"{name:>9} ").append(bar, style)
