"""The command `load`: it runs a load test on a pool, and shows it while it runs."""

from __future__ import annotations

import json
import signal
import sys
from typing import TYPE_CHECKING, Any, Final

import anyio
import attrs
import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table

from fastapi_topaz._app.config import TopazConfig
from fastapi_topaz._authorizer.options import Identity, IdentityType
from fastapi_topaz._authorizer.pool import ConnectionPool
from fastapi_topaz._authorizer.rego import check_reference
from fastapi_topaz._cli.load import LATE, Plan, Tally, run
from fastapi_topaz._cli.local import remote_part
from fastapi_topaz._cli.output import Causes, ms, new_console, say


if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from rich.console import Console, RenderableType

    from fastapi_topaz._authorizer.options import AuthorizerOptions
    from fastapi_topaz._pool.state.status import PoolStatus


__all__ = [
    "LoadSettings",
    "Pace",
    "caller",
    "configured",
    "dashboard",
    "load_test",
]


REFRESH: Final = 0.25
"""Seconds between two pictures on a terminal."""

BEHIND: Final = 0.1
"""Seconds above which the output says how late calls began."""

LINES: Final = 1.0
"""Seconds between two lines without a terminal."""

RATE_NOT_REACHED: Final = 3
"""The exit code if no call failed, but some were not made."""

INTERRUPTED: Final = 130


@attrs.frozen(kw_only=True)
class LoadSettings:
    """
    What to load, and how.

    Args:
        options: The authorizer.
        plan: How much load to make.
        policy_path: The policy to ask, as an anonymous caller. None: calls `Info`,
            which evaluates no policy.
        check_timeout: Time limit in seconds for each call, with its wait in the pool.
        connections: The most connections.
        streams: The calls at once on each of them.
        allows_remote: Whether another machine may be loaded.
        as_json: Whether to print one JSON object and nothing else.
    """

    options: AuthorizerOptions
    plan: Plan
    policy_path: str | None
    check_timeout: float
    connections: int
    streams: int
    allows_remote: bool
    as_json: bool


def load_test(settings: LoadSettings, backend: str) -> int:
    """
    Run the load test, and return the exit code.

    Raises:
        typer.BadParameter: A setting cannot be used, or the url leads to another
            machine, and that was not permitted.
    """
    console = new_console()
    tally, seen = Tally(), Seen()
    # Warnings of the pool would disturb the output.
    with Causes():
        try:
            config = configured(settings)
            remote = anyio.run(_prepare, settings, config, backend=backend)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        if remote is not None:
            raise typer.BadParameter(
                f"{settings.options.url} is not on this machine: {remote}. A load test "
                "can make a Topaz unavailable for its users. Pass --allow-remote if "
                "you may do that."
            )
        was_stopped = anyio.run(
            _load, settings, config, console, tally, seen, backend=backend
        )
    verdicts = list(verdict(settings, tally))
    if settings.as_json:
        said = {
            "target": settings.options.url,
            "interrupted": was_stopped,
            **tally.as_dict(),
            "verdict": verdicts,
            "pool": None if seen.status is None else seen.status.as_dict(),
        }
        sys.stdout.write(f"{json.dumps(said, indent=2)}\n")
    else:
        console.print(summary(settings, tally, seen.status))
        say(console, *verdicts)
    if was_stopped:
        return INTERRUPTED
    if tally.failed or not tally.calls:
        return 1
    return RATE_NOT_REACHED if tally.not_made else 0


def verdict(settings: LoadSettings, tally: Tally) -> Iterator[str]:
    """Yield what the numbers do not say: causes, and what a denial of all means."""
    due = f"of the {tally.due} calls that were due were not made"
    if tally.missed:
        yield (
            f"The rate was not reached: {tally.missed} {due}, because as many others "
            f"as --concurrency allows ({settings.plan.concurrency}) were running."
        )
    if tally.late:
        yield (
            f"The rate was not reached: {tally.late} {due}, because this machine could "
            f"not begin them within {LATE:g} s."
        )
    if 0 < tally.calls == tally.outcomes["denied"]:
        yield (
            "All calls were denied. A denial is an answer, so no call failed. The "
            "caller is anonymous."
        )
    if (found := tally.causes.most_frequent()) is not None:
        cause, times = found
        yield f"Cause: {cause} ({times} of {tally.failed} failed calls)"


@attrs.define
class Seen:
    """The last status of the pool while it was open."""

    status: PoolStatus | None = None


def configured(settings: LoadSettings) -> TopazConfig:
    """
    Return the configuration of the calls, with its pool.

    Raises:
        ValueError: A setting cannot be used.
    """
    if settings.policy_path is not None:
        check_reference("policy_path", settings.policy_path)
    return TopazConfig(
        authorizer_options=settings.options,
        policy_path_root="load",
        identity_provider=lambda _request: Identity(IdentityType.NONE),
        connection_pool=ConnectionPool(
            max_connections=settings.connections,
            streams_per_connection=settings.streams,
            name="load",
        ),
        check_timeout=settings.check_timeout,
    )


async def _prepare(settings: LoadSettings, config: TopazConfig) -> str | None:
    """Return what of the url is another machine, if that is not permitted."""
    if not settings.allows_remote:
        remote = await remote_part(settings.options.url)
        if remote is not None:
            return remote
    # Opens the pool early, so that a wrong certificate file is reported as wrong usage.
    async with config.connection_pool:
        return None


async def _load(
    settings: LoadSettings,
    config: TopazConfig,
    console: Console,
    tally: Tally,
    seen: Seen,
) -> bool:
    """Run the test. Return whether Ctrl-C ended it."""
    pool = config.connection_pool
    was_stopped = False
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with pool, anyio.create_task_group() as tasks:
            test = anyio.CancelScope()

            async def stop_on_signal() -> None:
                nonlocal was_stopped
                async for _ in signals:
                    was_stopped = True
                    test.cancel()

            tasks.start_soon(stop_on_signal)
            tasks.start_soon(_show, settings, console, tally, pool, seen)
            with test:
                await run(settings.plan, caller(settings, config), tally)
            seen.status = pool.status()
            tasks.cancel_scope.cancel()
    return was_stopped


def caller(settings: LoadSettings, config: TopazConfig) -> Callable[[], Awaitable[str]]:
    """Return the function that makes one call, and returns its outcome."""
    path, limit = settings.policy_path, settings.check_timeout
    if path is not None:
        check = path

        async def decide() -> str:
            decision = await config.decide(_request(), check, max_age=0)
            return "allowed" if decision.allowed else "denied"

        return decide

    async def info() -> str:
        end = anyio.current_time() + limit
        async with config.connection_pool.acquire(timeout=limit) as conn:
            await conn.info(timeout=max(0.001, end - anyio.current_time()))
        return "answered"

    return info


def _request() -> Any:
    # Imported here, because FastAPI takes longer to import than the rest.
    from starlette.requests import Request  # noqa: PLC0415

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    return Request({**scope, "path_params": {}, "query_string": b""})


# -- the output ---------------------------------------------------------------------


async def _show(
    settings: LoadSettings,
    console: Console,
    tally: Tally,
    pool: ConnectionPool,
    seen: Seen,
) -> None:
    """Show the test while it runs."""
    begin, pace = anyio.current_time(), Pace()
    if settings.as_json:
        return
    if not console.is_terminal:
        say(console, _title(settings))
        while True:
            await anyio.sleep(LINES)
            seen.status = pool.status()
            elapsed = anyio.current_time() - begin
            say(console, line(tally, seen.status, elapsed, pace.now(tally, elapsed)))
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            seen.status = pool.status()
            elapsed = anyio.current_time() - begin
            picture = dashboard(
                settings, tally, seen.status, elapsed, pace.now(tally, elapsed)
            )
            live.update(picture, refresh=True)
            await anyio.sleep(REFRESH)


@attrs.define
class Pace:
    """The calls per second in about the last second."""

    _points: list[tuple[float, int]] = attrs.Factory(lambda: [(0.0, 0)])

    def now(self, tally: Tally, elapsed: float) -> float:
        """Return the present rate."""
        self._points.append((elapsed, tally.calls))
        while len(self._points) > 2 and self._points[1][0] < elapsed - 1:
            del self._points[0]
        since, calls = self._points[0]
        return (tally.calls - calls) / (elapsed - since) if elapsed > since else 0.0


def line(tally: Tally, status: PoolStatus, elapsed: float, rate: float) -> str:
    """Return one line about the test so far."""
    times = tally.latencies
    not_made = f"  not made {tally.not_made}" if tally.not_made else ""
    return (
        f"{elapsed:5.0f} s  {rate:7.0f}/s  p50 {ms(times.quantile(0.5))}  "
        f"p99 {ms(times.quantile(0.99))}  failed {tally.failed}{not_made}  connections "
        f"{status.total}  waiting {status.waiting}  limit {status.limit}"
    )


def dashboard(
    settings: LoadSettings,
    tally: Tally,
    status: PoolStatus,
    elapsed: float,
    rate: float,
) -> RenderableType:
    """Return the picture of the test so far."""
    left = max(0.0, settings.plan.duration - elapsed)
    now = Table(_title(settings), title_justify="left")
    now.add_column(justify="right")
    now.add_row("left", f"{left:.0f} s")
    now.add_row("calls per second", f"{rate:.0f}")
    now.add_row("running", str(tally.running))
    _add_not_made(now, tally)
    return Group(now, _times(tally), _outcomes(tally), _pool(status))


def summary(
    settings: LoadSettings, tally: Tally, status: PoolStatus | None
) -> RenderableType:
    """Return the result of the test."""
    result = Table(_title(settings), title="Result", title_justify="left")
    result.add_column(justify="right")
    result.add_row("calls", str(tally.calls))
    result.add_row("calls per second", f"{tally.rate:.0f}")
    result.add_row("failed", str(tally.failed))
    _add_not_made(result, tally)
    if tally.cut_off:
        result.add_row("cut off at the end", str(tally.cut_off))
    result.add_row("duration", f"{tally.elapsed:.1f} s")
    parts: list[RenderableType] = [result, _times(tally), _outcomes(tally)]
    return Group(*parts, *([] if status is None else [_pool(status)]))


def _title(settings: LoadSettings) -> str:
    plan = settings.plan
    what = settings.policy_path or "Info"
    how = f"{plan.workers} at once"
    if plan.rate is not None:
        how = f"{plan.rate:g} per second"
        if plan.concurrency is not None:
            how += f", at most {plan.concurrency} at once"
    return f"{what} at {settings.options.url}, {how}"


def _add_not_made(table: Table, tally: Tally) -> None:
    if tally.missed:
        table.add_row("not made: too many were running", str(tally.missed))
    if tally.late:
        table.add_row("not made: this machine is too slow", str(tally.late))
    if tally.behind > BEHIND:
        table.add_row("begun late, by up to", f"{tally.behind:.1f} s")


def _times(tally: Tally) -> Table:
    table = Table("latency", "p50", "p90", "p99", "p99.9", "max")
    quantiles = (tally.latencies.quantile(each) for each in (0.5, 0.9, 0.99, 0.999))
    table.add_row("answered calls", *map(ms, quantiles), ms(tally.latencies.most))
    return table


def _outcomes(tally: Tally) -> Table:
    table = Table("outcome")
    table.add_column("calls", justify="right")
    for outcome, count in tally.outcomes.most_common():
        table.add_row(outcome, str(count))
    return table


def _pool(status: PoolStatus) -> Table:
    table = Table("pool")
    for name in ("connections", "busy", "connecting", "waiting", "limit", "because"):
        table.add_column(name, justify="right")
    table.add_row(
        "healthy" if status.healthy else "not healthy",
        f"{status.total}/{status.max_connections}",
        str(status.busy),
        str(status.connecting),
        str(status.waiting),
        f"{status.limit}/{status.streams_max}",
        status.limit_reason,
    )
    return table
