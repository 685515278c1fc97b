"""
Test the examples: each with its documented command, in a separate process.

They use the embedded authorizer over a socket. The applications also run in this
process, on both backends. There the tests see that their pools are closed at the end.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re

import anyio
import httpx
import pytest

from fastapi_topaz import (
    ConnectionPool,
)
from fastapi_topaz._cli.demo import serving
from kit.examples import (
    COMPOSE,
    DECISIONS,
    EXAMPLES,
    OWNERS,
    PEOPLE,
    asked,
    command,
    environment,
    is_reader,
    load,
    program,
    run,
    started,
    statuses,
)
from kit.waiting import eventually


pytestmark = pytest.mark.real_clock


APPLICATIONS = ["lifespan_app", "hooks_app", "explicit_acquire"]


# -- imported into this process -------------------------------------------------------


@contextlib.contextmanager
def served(name, backend, authorizer):
    """Serve the application of an example, and check that its pool opens and closes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOPAZ_URL", authorizer.url)
        module = load(name)
    pool = module.pool if name == "explicit_acquire" else module.config.connection_pool
    assert repr(pool).startswith("<ConnectionPool new")
    with (
        serving(module.app, backend) as url,
        httpx.Client(base_url=url, trust_env=False) as client,
    ):
        assert repr(pool).startswith("<ConnectionPool open")
        yield client
    assert repr(pool).startswith("<ConnectionPool closed")
    anyio.run(eventually, lambda: authorizer.connections_open == 0)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("name", APPLICATIONS)
def test_an_application_answers_and_closes_its_pool(name, backend, authorizer):
    with served(name, backend, authorizer) as client:
        assert statuses(client) == [200, 403, 403]
        assert client.get("/documents", headers={"x-user": "bob"}).json() == ["1", "2"]


def test_the_application_of_the_guide_runs(authorizer):
    with served("lifespan_app", "asyncio", authorizer) as client:
        bob = {"x-user": "bob"}
        assert client.get("/documents/2", headers=bob).json() == {"id": "2"}
        assert statuses(client, "/documents/2") == [403, 403, 403]
        health = client.get("/health").json()
        assert health["status"] == "ok"
        assert health["connection_pool"]["max"] == 10
        assert health["connection_pool"]["total"] >= 1


def test_the_startup_hook_waits_for_the_first_connection(authorizer):
    with served("hooks_app", "asyncio", authorizer):
        assert authorizer.connections_open == 1


def test_an_explicit_lease_in_the_example_works(authorizer):
    with served("explicit_acquire", "asyncio", authorizer) as client:
        alice, bob = {"x-user": "alice"}, {"x-user": "bob"}
        path = "/documents/1/rights"
        assert client.get(path, headers=alice).json() == {"read": True, "delete": True}
        assert client.get(path, headers=bob).json() == {"read": True, "delete": False}
        assert statuses(client, path) == [200, 403, 403]
        for path in ("/documents", "/documents/1/rights"):
            authorizer.fail("INTERNAL")
            answer = client.get(path, headers=alice)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            authorizer.heal()
            assert client.get(path, headers=alice).status_code == 200


def test_many_concurrent_questions_on_trio(authorizer):
    with served("trio_app", "trio", authorizer) as client:
        assert statuses(client) == [200, 403, 403]
        assert client.get("/documents", headers={"x-user": "alice"}).json() == ["1"]
        assert client.get("/documents", headers={"x-user": "bob"}).json() == ["1", "2"]
        assert statuses(client, "/documents/1") == [200, 403, 403]
        authorizer.policies["myapp.GET.documents.__id"] = lambda check: (
            is_reader(check) if check.resource["id"] == "1" else 1 / 0
        )
        answer = client.get("/documents", headers={"x-user": "alice"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert authorizer.connections_accepted <= 2


# -- run as by users ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "lifespan_app",
        pytest.param("hooks_app", marks=pytest.mark.slow),
        pytest.param("explicit_acquire", marks=pytest.mark.slow),
        "trio_app",
    ],
)
def test_the_command_of_an_application_works(name, authorizer, tmp_path, warnings_are):
    line = command(EXAMPLES / f"{name}.py")
    port = ("--port", "0") if line.startswith("uvicorn") else ("--bind", "127.0.0.1:0")
    env = environment(tmp_path, TOPAZ_URL=authorizer.url)
    arguments = program(line, *port, options=warnings_are)
    with (
        started(arguments, cwd=EXAMPLES, env=env) as (url, printed),
        httpx.Client(base_url=url, trust_env=False) as client,
    ):
        assert statuses(client) == [200, 403, 403]
    if line.startswith("uvicorn"):
        assert "Application shutdown complete" in "".join(printed)
    anyio.run(eventually, lambda: authorizer.connections_open == 0)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_command_of_the_program_works(backend, authorizer, tmp_path, warnings_are):
    line = command(EXAMPLES / "plain_anyio.py")
    env = environment(tmp_path, TOPAZ_URL=authorizer.url)
    *start, last = program(line, options=warnings_are)
    assert last == "trio"
    ended = run([*start, backend], env=env)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == [
        "alice may read 1",
        "alice may not read 2",
        "bob may read 1",
        "bob may read 2",
        "mallory may not read 1",
        "mallory may not read 2",
    ]
    assert authorizer.calls["Is"] == 6
    assert authorizer.connections_accepted <= 2


# -- several processes ----------------------------------------------------------------


def gunicorn(*more):
    line = command(EXAMPLES / "gunicorn.conf.py")
    return program(line, "--bind", "127.0.0.1:0", *more)


def test_the_command_of_several_workers_works(authorizer, tmp_path):
    env = environment(tmp_path, TOPAZ_URL=authorizer.url)
    two = gunicorn("--workers=2")
    with (
        # A worker that is stopped while it starts just ends.
        started(two, cwd=EXAMPLES, env=env, workers=2) as (url, printed),
        httpx.Client(base_url=url, trust_env=False) as client,
    ):
        # The parent has built the pool and opened no connection.
        assert statuses(client) == [200, 403, 403]
        assert client.get("/health").json()["connection_pool"]["total"] >= 1
    text = "".join(printed)
    assert text.count("Application shutdown complete") == 2
    assert "SIGKILL" not in text
    anyio.run(eventually, lambda: authorizer.connections_open == 0)


@pytest.mark.slow
def test_a_replacement_worker_has_its_own_pool(authorizer, tmp_path):
    env = environment(tmp_path, TOPAZ_URL=authorizer.url)
    few = ("--workers=1", "--max-requests=2", "--max-requests-jitter=0")
    alice = {"x-user": "alice"}
    with started(gunicorn(*few), cwd=EXAMPLES, env=env) as (url, printed):
        # The pool of a worker makes two connections, so these belong to three workers.
        while authorizer.connections_accepted <= 4:
            # Each request uses a new connection. An ending worker closes its accepted
            # connections, even if it has not read their requests.
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.get(f"{url}/documents", headers=alice, trust_env=False)
                assert answer.status_code == 200
    assert "".join(printed).count("Booting worker") >= 3
    anyio.run(eventually, lambda: authorizer.connections_open == 0)


def test_workers_are_not_killed_before_their_pools_are_closed():
    conf = load("gunicorn.conf")
    grace = inspect.signature(ConnectionPool.close).parameters["grace"].default
    assert grace == conf.POOL
    assert conf.Worker.CONFIG_KWARGS["timeout_graceful_shutdown"] == conf.REQUESTS
    assert conf.graceful_timeout > conf.REQUESTS + conf.POOL
    # The heartbeat comes twice per timeout. An ending worker sends none.
    assert conf.timeout / 2 > conf.REQUESTS + conf.POOL


# -- the list -------------------------------------------------------------------------


def test_the_readme_lists_each_example_with_its_command():
    text = (EXAMPLES / "README.md").read_text()
    row = r"^\| \[`(.+?)`\]\((.+?)\) \| [^|]* \| `([^`]+)` \|"
    rows = re.findall(row, text, re.MULTILINE)
    listed = {name: line for name, _, line in rows}
    files = {path.name: command(path) for path in EXAMPLES.glob("*.py")}
    (line,) = re.findall(
        r"^# {5}(\S.*)$", (COMPOSE / "docker-compose.yaml").read_text(), re.MULTILINE
    )
    here = line.replace("compose", "compose -f compose/docker-compose.yaml", 1)
    assert listed == {**files, "compose/": here, "quickstart/": "uvicorn main:app"}
    assert all((EXAMPLES / target).exists() for _, target, _ in rows)


def test_the_permission_table_of_the_readme_matches_the_policies():
    text = (EXAMPLES / "README.md").read_text()
    rows = re.findall(
        r"^\| `(myapp\S+)` \| (.+?) \| (.+?) \| (.+?) \|$", text, re.MULTILINE
    )

    def cell(path, user):
        may = [DECISIONS[path](asked(path, user, each)) for each in OWNERS]
        if not path.endswith("__id"):
            return "yes" if all(may) else "no"
        return ", ".join(itertools.compress(OWNERS, may)) or "none"

    expected = [(path, *(cell(path, user) for user in PEOPLE)) for path in DECISIONS]
    assert rows == expected
