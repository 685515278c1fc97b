"""The log volume is limited: the first event of a reason is logged, then counts."""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter

import anyio
import anyio.lowlevel
import grpc
import pytest
from fastapi import HTTPException
from hypothesis import given
from hypothesis import strategies as st

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionPool,
    Identity,
    IdentityType,
    PoolError,
    TopazConfig,
    require_policy_allowed,
)
from fastapi_topaz._log_limit import INTERVAL, MOST_REASONS, OTHER, LogLimit, _Reason
from fastapi_topaz.testing import FakeConnection, FakeConnector, fail, hang, ok
from kit.configs import Requests
from kit.logs import lines
from kit.pools import Making


ALLOWED = b"\n\x0b\n\x07allowed\x10\x01"


class Limited(logging.Handler):
    """A limit with its own clock and its own log."""

    def __init__(self, level=logging.DEBUG):
        super().__init__()
        self.now = 1000.0
        self.records = []
        logger = logging.Logger("limited", level)  # noqa: LOG001  (its own logger)
        logger.addHandler(self)
        self.limit = LogLimit(logger, "the label", lambda: self.now)

    def emit(self, record):
        self.records.append((self.now, record))

    def event(self, reason="refused", level=logging.WARNING, **options):
        self.limit.report(level, reason, "event of %s", reason, **options)

    @property
    def lines(self):
        return [record.getMessage() for _, record in self.records]


def events_in(lines):
    """Return the number of events that *lines* report."""
    total = 0
    for line in lines:
        # A line that reports only a count has no event of its own.
        total += re.match(r"(the label|the pool|checks): [^(]*: \d+ more", line) is None
        total += sum(map(int, re.findall(r"(\d+) more in the last", line)))
        total += sum(map(int, re.findall(r"[a-z:] \((\d+)\)", line)))
    return total


# -- the limit ------------------------------------------------------------------------


def test_the_first_event_is_logged_at_once_and_then_one_line_every_10_s():
    log = Limited()
    for _ in range(240):
        log.event()
        log.now += 0.25
    assert INTERVAL == 10
    times = [when for when, _ in log.records]
    assert times == pytest.approx([1000, 1010, 1020, 1030, 1040, 1050], abs=0.001)
    assert log.lines[0] == "event of refused"
    assert log.lines[1] == "event of refused (and 39 more in the last 10 s)"
    log.limit.flush(everything=True)
    assert events_in(log.lines) == 240


def test_each_reason_is_counted_separately():
    log = Limited()
    for _ in range(5):
        log.event("refused")
    log.event("tls")
    assert log.lines == ["event of refused", "event of tls"]
    log.now += 10
    log.event("tls")
    # The next line reports the counts of other reasons, whatever its subject.
    assert log.lines[2:] == [
        "event of tls",
        "the label: refused: 4 more in the last 10 s",
    ]
    assert log.limit.held == 0


def test_after_a_quiet_interval_an_event_is_logged_at_once():
    log = Limited()
    for pause in (10, 25, 1000):
        log.event()
        log.now += pause
    assert log.lines == ["event of refused"] * 3


def test_a_later_line_says_since_when_events_were_suppressed():
    log = Limited()
    for pause in (1, 1, 42):
        log.event()
        log.now += pause
    log.event()
    assert log.lines[-1] == "event of refused (and 2 more in the last 44 s)"


def test_the_memory_for_10_000_reasons_is_bounded_and_no_event_is_lost():
    log = Limited()
    for number in range(10_000):
        log.event(f"reason {number}")
        log.now += 0.001
    assert len(log.limit._reasons) == MOST_REASONS == 32
    assert len(log.lines) <= MOST_REASONS
    log.limit.flush(everything=True)
    assert log.lines[-1].startswith(f"the label: {OTHER}: ")
    assert events_in(log.lines) == 10_000
    assert log.limit.held == 0


def test_quiet_reasons_make_room_for_new_ones():
    log = Limited()
    for number in range(1000):
        log.event(f"reason {number}")
        log.now += 1
    # Never more than 10 at a time, so that each reason had its own line.
    assert log.lines == [f"event of reason {number}" for number in range(1000)]
    assert len(log.limit._reasons) <= MOST_REASONS


def test_a_reason_with_a_count_makes_room_once_its_count_is_logged():
    log = Limited()
    for number, _ in itertools.product(range(MOST_REASONS), range(3)):
        log.event(f"reason {number}")
    log.now += 60
    log.event("another")
    log.now += 60
    log.event("one more")
    assert "event of another" in log.lines
    assert "event of one more" in log.lines
    assert OTHER not in log.limit._reasons or log.limit.held == 0
    assert events_in(log.lines) == 3 * MOST_REASONS + 2


@given(
    st.lists(
        st.tuples(
            st.integers(0, 40),
            st.sampled_from([0, 0, 0.5, 3, 9.9, 10, 15]),
            st.sampled_from(["", "", "", "flush", "all"]),
        ),
        max_size=200,
    )
)
def test_counts_add_up_and_lines_of_one_reason_are_10_s_apart(events):
    log = Limited()
    for number, pause, then in events:
        log.event(f"r{number}")
        log.now += pause
        if then == "flush":
            log.limit.flush()
        assert log.limit.held == sum(r.held for r in log.limit._reasons.values())
        assert len(log.limit._reasons) <= MOST_REASONS
    told_at = {}
    for when, record in log.records:
        # Reasons that share OTHER are identified by the text of the event.
        name = re.search(r"r\d+|other reasons", record.getMessage())[0]
        if int(name[1:]) < MOST_REASONS - 1 if name[1:].isdigit() else True:
            assert when - told_at.get(name, -100) >= INTERVAL or OTHER in told_at
        told_at[name] = when
    log.limit.flush(everything=True)
    assert log.limit.held == 0
    assert events_in(log.lines) == len(events)


def test_debug_lines_are_not_limited_and_disabled_lines_are_not_counted():
    log = Limited()
    for _ in range(3):
        log.event(level=logging.DEBUG)
    assert len(log.lines) == 3
    log = Limited(level=logging.ERROR)
    for _ in range(3):
        log.event()
    log.event(level=logging.ERROR)
    assert log.lines == ["event of refused"]


@pytest.mark.parametrize("clock", [500.0, -500.0, 1e12])
def test_a_clock_that_is_set_back_does_not_silence_a_reason(clock):
    log = Limited()
    log.event()
    log.event()
    log.now = clock
    log.event()
    log.event()
    assert len(log.lines) == 2
    assert events_in(log.lines) == 3


def test_one_line_can_report_all_counts():
    log = Limited()
    for reason in ("lost", "refused", "lost", "lost", "refused"):
        log.event(reason)
    log.event("connected", all_counts=True)
    assert log.lines[-1] == (
        "event of connected; not logged meanwhile: lost (2), refused (1)"
    )
    assert log.limit.held == 0
    assert events_in(log.lines) == 6


def test_a_record_names_the_calling_line_and_is_formatted_lazily():
    log = Limited()
    error = ValueError("x")
    log.event(exc_info=error)
    ((_, record),) = log.records
    assert record.filename == "test_log_limit.py"
    assert record.args == ("refused",)
    assert record.exc_info[1] is error


def test_the_limit_uses_the_monotonic_clock(monkeypatch):
    log = Limited()
    log.limit.clock = None
    for now in (50.0, 59.9, 60.0):
        monkeypatch.setattr("time.monotonic", lambda now=now: now)
        log.event()
    assert len(log.lines) == 2


# -- an outage, in virtual time -------------------------------------------------------


class Checks:
    """Checks of an application with a log limit that uses the virtual time."""

    def __init__(self, connector, **options):
        options = {"min_connections": 0, "acquire_timeout": 1, **options}
        self.pool = ConnectionPool(connector=connector, **options)
        self.config = TopazConfig(
            authorizer_options=AuthorizerOptions(),
            policy_path_root="app",
            identity_provider=lambda _request: Identity(IdentityType.NONE),
            connection_pool=self.pool,
            check_timeout=2,
        )
        self.config._log_limit.clock = anyio.current_time
        self.statuses = Counter()

    async def check(self, number=0):
        guard = require_policy_allowed(self.config, f"app.x{number}")
        request = Requests({"type": "http", "path_params": {}, "headers": []})
        try:
            await guard(request)
            self.statuses[200] += 1
        except HTTPException as error:
            self.statuses[error.status_code] += 1

    async def run(self, callers, seconds, pause=1):
        end = anyio.current_time() + seconds

        async def caller(number):
            while anyio.current_time() < end:
                await self.check(number)
                await anyio.sleep(pause)

        async with anyio.create_task_group() as tasks:
            for number in range(callers):
                tasks.start_soon(caller, number)


def answers(code):
    """Return a connector of connections that end calls with the status *code*."""

    def answer(_method, _request):
        empty = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(code, empty, empty, details="gone")

    return FakeConnector(answer=answer)


class Dying(FakeConnection):
    """A connection that its first call loses."""

    async def call(self, *_args, **_options):
        self.hung_up = True
        return await super().call("/a/b", b"")


OUTAGES = {
    "refused": lambda: FakeConnector(default=fail()),
    "silent": lambda: FakeConnector(default=hang()),
    "unavailable": lambda: answers(grpc.StatusCode.UNAVAILABLE),
    "internal": lambda: answers(grpc.StatusCode.INTERNAL),
    "hanging up": lambda: Making(Dying),
    "on and off": lambda: Making(Dying, script=[fail(), ok()] * 500),
}


@pytest.mark.costly
@pytest.mark.parametrize("callers", [30, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("outage", list(OUTAGES))
async def test_an_outage_of_8_s_with_many_callers_logs_a_handful_of_lines(
    outage, callers, caplog
):
    checks = Checks(OUTAGES[outage]())
    async with checks.config.lifespan(None):
        await checks.run(callers, 8)
        told = lines(caplog, logging.INFO, logger="fastapi_topaz")
        assert checks.statuses.keys() == {503}
        assert checks.statuses[503] >= 2 * callers
        assert any("no decision" in line for line in told)
        assert len(told) <= 10
    of_checks = lines(caplog, logging.INFO, logger="fastapi_topaz.fastapi")
    assert events_in(of_checks) == checks.statuses[503]


async def test_an_outage_of_a_minute_logs_a_line_every_10_s(caplog):
    checks = Checks(OUTAGES["refused"]())
    async with checks.config.lifespan(None):
        await checks.run(5, 60, pause=0.5)
    told = lines(caplog, logging.INFO, logger="fastapi_topaz.fastapi")
    # At 0, 10, 20, 30, 40 and 50 s, and the rest at the end.
    assert len(told) == 7
    for line in told[1:-1]:
        assert re.search(r"\(and \d+ more in the last 1[01] s\)", line)
    assert events_in(told) == checks.statuses[503]


async def test_checks_without_a_decision_are_logged_with_a_count(caplog):
    connector = FakeConnector(default=fail(), answer=lambda _method, _request: ALLOWED)
    checks = Checks(connector)
    async with checks.config.lifespan(None):
        await checks.run(5, 5)
        connector.default = ok()
        await checks.run(1, 12, pause=0.1)
        failed = checks.statuses[503]
        told = lines(caplog, logging.INFO, logger="fastapi_topaz.fastapi")
    assert checks.statuses[200] > 50
    assert len(told) == 2
    assert re.fullmatch(
        r"checks: no decision: ConnectFailed: \d+ more in the last 10 s", told[1]
    )
    assert events_in(told) == failed


async def test_connections_that_end_together_log_one_line_and_a_count(caplog):
    connector = FakeConnector()
    pool = ConnectionPool(connector=connector, min_connections=10, eager_init=True)
    async with pool:
        # Idle for longer than a connection that ends because the server is unhealthy.
        await anyio.sleep(3)
        for conn in connector.open:
            conn.hung_up = True
        connector.default = fail()
        await anyio.sleep(4)
        told = lines(caplog, logging.INFO, logger="fastapi_topaz")
        assert sum("closing a connection" in line for line in told) == 1
        connector.default = ok()
        await anyio.sleep(10)
        (over,) = [
            line
            for line in lines(caplog, logging.INFO, logger="fastapi_topaz")
            if "the outage is over" in line
        ]
    assert "not logged meanwhile: closing: lost (9)" in over


async def test_health_checks_that_fail_together_log_one_line_and_a_count(caplog):
    connector = FakeConnector()
    pool = ConnectionPool(
        connector=connector,
        min_connections=10,
        eager_init=True,
        health_check_interval=5,
    )
    async with pool:
        for conn in connector.open:
            conn.alive = False
        await anyio.sleep(11)
        failed = [
            line
            for line in lines(caplog, logging.INFO, logger="fastapi_topaz")
            if "failed its health check" in line
        ]
        assert len(failed) == 1
        # The next rounds report the rest, even without other events.
        await anyio.sleep(20)
        assert any(
            re.search(r"health check failed: ConnectionLost: 9 more", line)
            for line in lines(caplog, logging.WARNING)
        )


async def test_closing_a_pool_logs_the_suppressed_counts(caplog):
    connector = FakeConnector()
    pool = ConnectionPool(connector=connector, min_connections=3, eager_init=True)
    async with pool:
        for conn in connector.open:
            conn.hung_up = True
        await anyio.sleep(2)
    assert [
        line
        for line in lines(caplog, logging.INFO, logger="fastapi_topaz")
        if "closing: lost: 2 more" in line
    ]


class Fatal(BaseException):
    """An error of a kind that ends the host task."""


class Watched(_Reason):
    """A reason in whose reading another thread logs a new reason."""

    limited = None

    def __getattribute__(self, name):
        limited = type(self).limited
        if name in {"held", "logged_at"} and limited is not None:
            reasons = limited.limit._reasons
            reasons.setdefault(f"other {len(reasons)}", _Reason(logging.INFO))
        return super().__getattribute__(name)


@pytest.mark.parametrize("number", [2, MOST_REASONS - 1])
def test_a_thread_that_logs_at_the_same_time_breaks_nothing(number, monkeypatch):
    limited = Limited()
    for n in range(number):
        limited.limit._reasons[f"reason {n}"] = Watched(logging.INFO)
    limited.limit.held = 1
    monkeypatch.setattr(Watched, "limited", limited)
    limited.event("new", all_counts=True)
    assert events_in(limited.lines) == 1


async def test_a_host_task_that_fails_at_each_use_does_not_flood_the_log(caplog):
    class Broken(FakeConnector):
        async def connect(self, _timeout):
            await anyio.lowlevel.checkpoint()
            raise Fatal

    pool = ConnectionPool(connector=Broken(), min_connections=0, name="main")
    for _ in range(50):
        with pytest.raises(PoolError):
            await pool.acquire()
        await anyio.sleep(0.01)
    assert len(lines(caplog, logging.CRITICAL)) == 1
    await pool.close()


async def test_a_judge_method_that_always_fails_logs_one_line(caplog):
    class Unjust(FakeConnection):
        def judge(self, _error):
            raise RuntimeError("no verdict")

    pool = ConnectionPool(connector=Making(Unjust), min_connections=0)
    async with pool, pool.acquire() as conn:
        conn.connection.alive = False
        for _ in range(100):
            with pytest.raises(PoolError):
                await conn.call("/a/b", b"")
    assert (
        sum(
            "judge() of a connection failed" in x
            for x in lines(caplog, logging.INFO, logger="fastapi_topaz")
        )
        == 1
    )
    assert any(
        "judge() failed: RuntimeError: 99 more" in x
        for x in lines(caplog, logging.INFO, logger="fastapi_topaz")
    )
