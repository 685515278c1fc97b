"""Servers with several workers, as users start them; each worker has its own pool."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from typing import TYPE_CHECKING

import psutil
import pytest

from kit.workers.authorizer import Authorizer
from kit.workers.load import CLIENTS, Load, ask_aside
from kit.workers.served import Answer, Served, Unanswered


if TYPE_CHECKING:
    from concurrent.futures import Future


pytestmark = pytest.mark.real_clock

GUNICORN = [
    *("gunicorn", "-k", "uvicorn_worker.UvicornWorker", "-b", "127.0.0.1:0"),
    # One file for all servers of a user, in the home directory.
    "--no-control-socket",
]
UVICORN = [
    *("uvicorn", "--port", "0", "--no-access-log"),
    # A busy machine is not a reason to kill a worker.
    *("--timeout-worker-healthcheck", "30"),
]
HYPERCORN = [
    *("hypercorn", "--worker-class", "trio", "-b", "127.0.0.1:0"),
    # As long as the other servers give running requests.
    *("--graceful-timeout", "30"),
]
SERVERS = {
    "gunicorn": GUNICORN,
    "gunicorn --preload": [*GUNICORN, "--preload"],
    "uvicorn": UVICORN,
    "hypercorn": HYPERCORN,
}
MAX_CONNECTIONS = 2


def servers(*names, cheap=()):
    """
    Run the test with each of these servers, by default only with the *cheap* ones.
    """
    return pytest.mark.parametrize(
        "server",
        [
            pytest.param(name, marks=() if name in cheap else pytest.mark.slow)
            for name in names
        ],
    )


@pytest.fixture
def topaz():
    with Authorizer() as authorizer:
        yield authorizer


@pytest.fixture
def serve(topaz, tmp_path):
    """Start a server, by name, with a number of workers; it ends with the test."""
    with contextlib.ExitStack() as stack:

        def start(
            server, workers, *options, app="app:app", check_timeout=60, env=(), **pool
        ):
            pool = {
                "max_connections": MAX_CONNECTIONS,
                # Longer than any test here takes.
                "acquire_timeout": check_timeout,
                **pool,
            }
            return stack.enter_context(
                Served(
                    [
                        *SERVERS[server],
                        *("--workers", str(workers)),
                        *options,
                        f"kit.workers.{app}",
                    ],
                    tmp_path / "log",
                    TOPAZ_URL=topaz.url,
                    POOL=json.dumps(pool),
                    CHECK_TIMEOUT=str(check_timeout),
                    **dict(env),
                )
            )

        yield start


def hold(served, enough) -> list[Future[Answer]]:
    """Send requests that wait for their answer, until *enough()* is true."""
    held: list[Future[Answer]] = []

    def sent():
        # One at a time: a worker accepts all requests that wait at that moment.
        if len(held) < 100:
            held.append(ask_aside(served, "/held"))
        return enough()

    served.until(sent)
    return held


def assert_counts_agree(served, topaz, *, but=frozenset(), lost=0):
    """
    Check that each check that was sent reached a client, and each answer was a check.

    Compare this for every worker, except *but*, which were killed. *lost* is how many
    answers may have been lost on the way to the client.
    """
    assert {answer.status for answer in served.answers} == {200}, served.log
    answered = served.answered()
    pids = (answered.keys() | topaz.asked.keys()) - but
    missing = [topaz.asked[pid] - answered[pid] for pid in pids]
    assert min(missing) >= 0, served.log
    assert sum(missing) <= lost, served.log


def assert_ended_clean(served, topaz, code):
    assert code == 0
    assert served.cut == []
    for trouble in ("Traceback", "Exception", "was not closed", "SIGKILL", "ERROR"):
        assert trouble not in served.log
    served.until(lambda: topaz.connections_open == 0)


# -- the connection limit in each worker -----------------------------------------------


@servers(*SERVERS, cheap=["gunicorn --preload"])
def test_each_worker_opens_at_most_max_connections(server, serve, topaz):
    workers = 2 if server == "hypercorn" else 4
    most = workers * MAX_CONNECTIONS
    served = serve(server, workers)
    pids = served.workers(workers)

    with Load(served):
        # Each connection carries a check, so there are as many as allowed.
        held = hold(served, lambda: sum(topaz.holding.values()) == most)
        assert topaz.connections_open == topaz.peak == most
        assert topaz.holding == dict.fromkeys(pids, MAX_CONNECTIONS)
        topaz.let_go()
    for answer in held:
        assert answer.result().status == 200

    # Only the first ones: none was ever closed, and none opened beyond the limit.
    assert topaz.connections_open == topaz.connections_accepted == most
    assert {answer.pid for answer in served.answers} == pids
    built_in = {answer.built_in for answer in served.answers}
    assert built_in == ({served.pid} if "--preload" in server else pids)
    assert_counts_agree(served, topaz)
    assert_ended_clean(served, topaz, served.stop())


# -- opened before the fork ------------------------------------------------------------


GRPCIO = {"transport": "grpcio", "eager_init": True}


REFUSAL = (
    "the pool was opened in process {parent} and is used in process {child}, which was "
    "forked from it; gRPC connections do not survive a fork, so open the pool in each "
    "worker, in the lifespan or a startup hook"
)


def test_a_pool_opened_before_the_fork_stops_the_server_at_startup(serve, topaz):
    served = serve("gunicorn --preload", 1, app="opened:app", **GRPCIO)

    # Worker failed to boot: gunicorn gives up and does not retry forever.
    assert served.ended() == 3
    child = re.search(r"Booting worker with pid: (\d+)", served.log)[1]
    assert REFUSAL.format(parent=served.pid, child=child) in served.log
    served.until(lambda: topaz.connections_open == 0)


@pytest.mark.slow
def test_a_pool_opened_before_the_fork_allows_no_request(serve, topaz):
    served = serve("gunicorn --preload", 2, app="opened:lazy", **GRPCIO)
    assert served.asked_first() == Answer(500)
    for _ in range(20):
        assert served.ask() == Answer(500)
    children = set(re.findall(r"with pid: (\d+)", served.log))
    refused = set(re.findall(r"used in process (\d+)", served.log))
    assert refused
    assert refused <= children
    for child in refused:
        assert REFUSAL.format(parent=served.pid, child=child) in served.log
    # The parent's own connections still work.
    assert topaz.connections_open == 2
    assert not topaz.asked

    assert served.stop() == 0
    served.until(lambda: topaz.connections_open == 0)


def test_a_pool_closed_before_the_fork_works_after_it(serve, topaz):
    served = serve("gunicorn --preload", 2, app="warmed:app")

    assert len(served.workers(2)) == 2
    assert {answer.built_in for answer in served.answers} == {served.pid}
    # One is the application's own check. The others are the first probes of
    # connections. The parent may have closed its second connection before its probe.
    served.until(lambda: topaz.calls["Info"] - topaz.connections_accepted in {0, 1})
    assert_counts_agree(served, topaz)
    assert_ended_clean(served, topaz, served.stop())


@pytest.mark.slow
def test_a_closed_connection_that_is_still_referenced_counts_as_open(serve, topaz):
    # Otherwise gRPC would hang in the workers without a message.
    served = serve("gunicorn --preload", 1, app="kept:app", transport="grpcio")

    assert served.asked_first() == Answer(500)
    [child] = re.findall(r"with pid: (\d+)", served.log)
    assert f"process {child} was forked from {served.pid}" in served.log
    assert served.stop() == 0


@pytest.mark.parametrize(
    "app", ["opened", pytest.param("kept", marks=pytest.mark.slow)]
)
def test_on_the_native_transport_each_worker_opens_its_own_pool(app, serve, topaz):
    served = serve(
        "gunicorn --preload",
        *(2, "--max-requests", "20"),
        app=f"{app}:app",
        transport="native",
        eager_init=True,
    )
    first = served.workers(2)
    own = topaz.sockets_of(served.pid)
    assert len(own) == (MAX_CONNECTIONS if app == "opened" else 0)
    # Also workers that are forked later, while others are in use.
    with Load(served, repeats=3):
        served.until(lambda: len(set(served.answered()) - {None} - first) >= 2)
        assert topaz.sockets_of(served.pid) == own
        # No worker keeps a copy of a socket of its parent.
        for pid in served.alive() - {served.pid}:
            with contextlib.suppress(psutil.NoSuchProcess):
                assert not topaz.sockets_of(pid) & own
    assert {answer.built_in for answer in served.answers} == {served.pid}
    assert_counts_agree(served, topaz)
    assert topaz.sockets_of(served.pid) == own
    assert_ended_clean(served, topaz, served.stop())


# -- workers that are replaced ---------------------------------------------------------


@servers("gunicorn", "gunicorn --preload", "uvicorn")
def test_a_graceful_reload_fails_no_request(server, serve, topaz):
    served = serve(server, 2)
    old = served.workers(2)

    # On a stop request, every server's worker closes connections that it has accepted
    # but not read from. uvicorn's protocols do this. The client cannot know when. But
    # it got no byte, so it may repeat a safe request. At worst, it meets both old
    # workers in a row.
    with Load(served, repeats=2) as load:
        served.send(signal.SIGHUP)
        served.until(lambda: not old & served.alive())
        new = served.workers(2, but=old)

    assert served.unanswered == []
    assert load.refused == []
    assert_counts_agree(served, topaz)
    # Old and new workers run side by side for a short time.
    assert topaz.peak <= 2 * 2 * MAX_CONNECTIONS
    served.until(lambda: topaz.connections_open <= 2 * MAX_CONNECTIONS)
    assert new == set(topaz.asked) - old
    assert_ended_clean(served, topaz, served.stop())


@pytest.mark.slow
def test_workers_that_restart_after_n_requests_fail_no_request(serve, topaz):
    served = serve("gunicorn --preload", 2, "--max-requests", "50")
    first = served.workers(2)

    with Load(served, repeats=2) as load:
        served.workers(4, but=first)

    assert served.unanswered == []
    assert load.refused == []
    assert_counts_agree(served, topaz)
    assert topaz.peak <= 2 * MAX_CONNECTIONS
    assert_ended_clean(served, topaz, served.stop())


@servers("gunicorn", "gunicorn --preload", "uvicorn")
def test_a_killed_worker_fails_only_its_own_requests(server, serve, topaz):
    # Room for the held requests and for the load, from the beginning.
    served = serve(server, 2, streams_per_connection=50, adaptive_limit=False)
    pids = served.workers(2)
    victim, survivor = pids

    with Load(served) as load:
        held = hold(served, lambda: all(topaz.holding[pid] >= 2 for pid in pids))
        sockets = topaz.sockets_of(victim)
        assert sockets
        assert sockets < topaz.sockets()
        os.kill(victim, signal.SIGKILL)

        served.until(lambda: not sockets & topaz.sockets())
        served.until(lambda: topaz.holding[victim] == 0)
        [new] = served.workers(2, but={victim}) - {survivor}
        topaz.let_go()
        ended = [future.exception() or future.result() for future in held]

    assert {victim, survivor, new} == topaz.asked.keys()
    lost = [one for one in ended if isinstance(one, Unanswered)]
    assert len(lost) >= 2
    assert {one.pid for one in ended if one not in lost} <= {survivor, new}
    # A load client has one request at a time, and only one killed worker can lose it.
    unanswered = len(served.unanswered) + len(served.cut)
    assert len(lost) <= unanswered <= len(lost) + CLIENTS
    assert load.refused == []
    assert_counts_agree(served, topaz, but={victim})
    answered = served.answered()[victim]
    most = answered + unanswered + len(served.repeated)
    assert answered + len(lost) <= topaz.asked[victim] <= most
    assert topaz.connections_open <= 2 * MAX_CONNECTIONS
    code = served.stop()
    if "gunicorn" in server:  # the line about the worker that it lost
        assert "SIGKILL" in served.log
    assert code == 0
    assert "Traceback" not in served.log
    served.until(lambda: topaz.connections_open == 0)


# -- stopping --------------------------------------------------------------------------


def lost_at_the_end(server, served):
    """Return how many answers a server may lose when it stops."""
    # Hypercorn counts a connection as idle until shortly after the application got its
    # request. It closes idle connections.
    return len(served.unanswered) if server == "hypercorn" else 0


@servers(*SERVERS, cheap=["gunicorn --preload"])
def test_sigterm_under_load_answers_started_requests_and_leaves_no_process(
    server, serve, topaz
):
    served = serve(server, 2)
    pids = served.workers(2)

    with Load(served) as load:
        held = hold(served, lambda: all(topaz.holding[pid] for pid in pids))
        served.send(signal.SIGTERM)
        served.until(lambda: not any(served.listening(pid) for pid in pids))
        # The workers wait for these.
        assert pids <= served.alive()
        topaz.let_go()
        code = served.ended()
        ended = [future.exception() or future.result() for future in held]
        served.until(lambda: len(load.refused) == CLIENTS)

    assert_ended_clean(served, topaz, code)
    assert_counts_agree(served, topaz, lost=lost_at_the_end(server, served))
    assert sum(isinstance(one, Answer) for one in ended) >= len(pids)


@servers("gunicorn --preload", "uvicorn", "hypercorn")
def test_ctrl_c_under_load_answers_started_requests_and_leaves_no_process(
    server, serve, topaz
):
    served = serve(server, 2)
    served.workers(2)

    with Load(served):
        # A terminal sends it to all processes at once.
        for pid in served.alive():
            os.kill(pid, signal.SIGINT)
        code = served.ended()

    assert_ended_clean(served, topaz, code)
    assert_counts_agree(served, topaz, lost=lost_at_the_end(server, served))


@servers("gunicorn --preload", "uvicorn", "hypercorn")
def test_sigterm_waits_for_a_silent_authorizer_only_until_checks_time_out(
    server, serve, topaz
):
    served = serve(server, 2, check_timeout=2)
    pids = served.workers(2)
    held = hold(served, lambda: all(topaz.holding[pid] for pid in pids))
    topaz.freeze()

    code = served.stop()

    # No timeout of the server expired: no request was cancelled, no process killed.
    ended = [future.exception() or future.result() for future in held]
    answers = [one for one in ended if isinstance(one, Answer)]
    assert len(answers) >= 2
    assert set(answers) == {Answer(503)}
    assert_ended_clean(served, topaz, code)


# -- without an authorizer -------------------------------------------------------------


@pytest.mark.slow
def test_workers_keep_their_heartbeat_while_the_authorizer_is_silent(serve, topaz):
    served = serve("gunicorn --preload", 1, "--timeout", "4", check_timeout=1)
    [pid] = served.workers(1)
    before = len(served.answers)
    topaz.freeze()

    with Load(served):
        # Each client waits a second for each answer, which is twice as long as a worker
        # may be without a heartbeat.
        enough = before + 8 * CLIENTS
        served.until(lambda: len(served.answers) >= enough)
    assert set(served.answers[before:]) == {Answer(503)}
    topaz.thaw()
    served.until(lambda: served.ask().status == 200)

    assert served.workers(1) == {pid}
    assert "TIMEOUT" not in served.log
    assert_ended_clean(served, topaz, served.stop())


@servers("gunicorn --preload", "uvicorn", "hypercorn")
def test_workers_start_without_an_authorizer_and_serve_once_it_is_up(
    server, serve, topaz
):
    topaz.stop()
    served = serve(server, 2, eager_init=True, connection_timeout=1, check_timeout=5)

    assert served.asked_first() == Answer(503)
    assert "the pool keeps trying" in served.log
    topaz.start()
    served.until(lambda: served.ask().status == 200)

    served.workers(2)
    assert_ended_clean(served, topaz, served.stop())


@servers("gunicorn", "gunicorn --preload", "uvicorn")
def test_a_permanent_failure_stops_the_server_at_startup(server, serve, tmp_path):
    missing = str(tmp_path / "ca.pem")
    # One worker: servers with several workers do not always exit with the same code.
    served = serve(server, 1, env={"TOPAZ_CERT": missing})

    assert served.ended() != 0
    assert (
        f"must be a readable PEM file of CA certificates, got {missing!r}" in served.log
    )
