"""Test the stream of events of the status page: its pace, its end, and its limits."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path

import anyio
import httpx
import pytest
from fastapi import FastAPI

from fastapi_topaz import status_app
from fastapi_topaz._app import listeners, status_stream
from fastapi_topaz._app.listeners import Listeners
from fastapi_topaz._app.status_stream import EVERY, LONGEST, MOST_STREAMS, SLOWEST
from fastapi_topaz._cli.demo import serving
from kit.backends import backends
from kit.configs import config_of
from kit.pools import make_pool
from kit.waiting import until


class Client:
    """The other side of one request for events, as an ASGI server sees it."""

    def __init__(self, app=None, stuck=None, error=None):
        self.app = app or status_app(config_of(make_pool()), guard=lambda _: True)
        self.sent = []
        self.times = []
        self.gone = anyio.Event()
        self.stuck = stuck
        self.error = error
        self.asked = False

    async def receive(self):
        if not self.asked:
            self.asked = True
            return {"type": "http.request"}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if self.error is not None:
            raise self.error
        self.sent.append(message)
        self.times.append(anyio.current_time())
        if self.stuck is not None and len(self.sent) > self.stuck:
            await anyio.sleep_forever()

    async def run(self):
        scope = {"type": "http", "method": "GET", "path": "/events", "headers": []}
        await self.app(scope, self.receive, self.send)

    @property
    def status(self):
        return self.sent[0]["status"]

    @property
    def events(self):
        bodies = [message["body"] for message in self.sent[1:] if message["body"]]
        return [body for body in bodies if body.startswith(b"data: ")]

    @property
    def ended(self):
        return self.sent[-1].get("more_body") is False

    @property
    def running(self):
        return self.app._streams._running


@pytest.fixture(autouse=True)
def _virtual_monotonic(request, monkeypatch):
    if request.node.get_closest_marker("real_clock") is None:
        monkeypatch.setattr(status_stream.time, "monotonic", anyio.current_time)


# -- pace and end -------------------------------------------------------------------


async def test_an_event_comes_every_second_until_the_stream_ends():
    client = Client()
    began = anyio.current_time()
    await client.run()
    assert client.sent[1]["body"] == b"retry: 500\n\n"
    assert len(client.events) == LONGEST / EVERY
    assert client.ended
    assert anyio.current_time() - began == pytest.approx(LONGEST)
    for event in client.events:
        assert event.count(b"\n") == 2
        shown = json.loads(event.removeprefix(b"data: "))
        assert shown["process"]["pid"] == os.getpid()


async def test_the_stream_ends_if_the_client_is_gone():
    client = Client()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.run)
        await anyio.sleep(2.5)
        assert client.running == 1
        client.gone.set()
        await anyio.wait_all_tasks_blocked()
        assert client.running == 0
    assert len(client.events) == 3


async def test_a_cancelled_stream_gives_its_place_back():
    client = Client()
    with anyio.move_on_after(2):
        await client.run()
    assert client.running == 0


@pytest.mark.parametrize("stuck", [0, 1, 2, 3])
async def test_a_client_that_does_not_read_loses_its_stream(stuck):
    client = Client(stuck=stuck)
    began = anyio.current_time()
    with anyio.move_on_after(60):
        await client.run()
    pauses = EVERY * max(0, stuck - 2)
    assert anyio.current_time() - began == pytest.approx(SLOWEST + pauses)
    assert client.running == 0


@pytest.mark.parametrize("error", [OSError("gone"), BrokenPipeError()])
async def test_a_server_that_refuses_to_send_ends_the_stream(error):
    client = Client(error=error)
    await client.run()
    assert client.running == 0


async def test_an_error_in_the_snapshot_is_not_lost(monkeypatch):
    client = Client()
    monkeypatch.setattr(client.app._streams, "_text", lambda: 1 / 0)
    with pytest.RaisesGroup(ZeroDivisionError):
        await client.run()
    assert client.running == 0


async def test_all_streams_share_one_snapshot():
    first = Client()
    made = []
    text = first.app._streams._text
    first.app._streams._text = lambda: made.append(1) or text()
    async with anyio.create_task_group() as tasks:
        for client in [first, *(Client(first.app) for _ in range(9))]:
            tasks.start_soon(client.run)
    assert len(made) == LONGEST / EVERY


async def test_the_number_of_streams_is_limited():
    app = Client().app
    clients = [Client(app) for _ in range(MOST_STREAMS)]
    async with anyio.create_task_group() as tasks:
        for client in clients:
            tasks.start_soon(client.run)
        await anyio.wait_all_tasks_blocked()
        late = Client(app)
        await late.run()
        assert late.status == 503
        assert (b"retry-after", b"5") in late.sent[0]["headers"]
        clients[0].gone.set()
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(Client(app).run)
        await anyio.wait_all_tasks_blocked()
        assert clients[1].running == MOST_STREAMS
        tasks.cancel_scope.cancel()
    assert clients[0].running == 0


# -- the end of the server ----------------------------------------------------------


async def test_the_stream_ends_soon_after_a_listening_socket_is_closed():
    client = Client()
    async with anyio.create_task_group() as tasks:
        with socket.create_server(("127.0.0.1", 0)):
            tasks.start_soon(client.run)
            await anyio.sleep(1.05)
            assert not client.ended
        closed_at = anyio.current_time()
    assert client.ended
    assert client.times[-1] - closed_at < 0.2


def test_a_closed_socket_is_noticed_even_if_its_number_is_used_again():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.fileno()
        known = Listeners()
        assert not known.is_one_closed()
    assert known.is_one_closed()
    with socket.socket() as other:
        assert other.fileno() == number
        assert known.is_one_closed()


def test_a_unix_socket_counts(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        known = Listeners()
        assert not known.is_one_closed()
    assert known.is_one_closed()


def test_other_files_do_not_count():
    read, write = os.pipe()
    with socket.create_server(("127.0.0.1", 0)) as server:
        idle = socket.socket()
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        known = Listeners()
        for number in (read, write):
            os.close(number)
        for sock in (idle, client, accepted):
            sock.close()
        assert not known.is_one_closed()


def test_a_system_without_a_list_of_open_files_is_no_error(monkeypatch):
    def refuse(_path):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "iterdir", refuse)
    with socket.create_server(("127.0.0.1", 0)):
        known = Listeners()
    assert not known.is_one_closed()


def test_a_socket_that_is_closed_during_the_search_leaves_no_copy(monkeypatch):
    copies = []
    dup = os.dup
    monkeypatch.setattr(
        os, "dup", lambda number: copies.append(dup(number)) or copies[-1]
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with monkeypatch.context() as patch:
            # Its number belongs to another kind of file now.
            patch.setattr(listeners.socket, "socket", refuse)
            assert not listeners._listens(listener.fileno())
        assert listeners._listens(listener.fileno())
    assert len(copies) == 2
    for copy in copies:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(copy)


def refuse(**_options):
    raise OSError("this is no socket")


async def pass_on(request, call_next):
    return await call_next(request)


@contextlib.contextmanager
def streaming(backend, *, middleware=False):
    """Serve a page whose streams would not end by themselves; yield its URL."""
    config = config_of(make_pool())
    page = status_app(config, guard=lambda _request: True)
    app = FastAPI(lifespan=config.lifespan)
    app.mount("/topaz", page)
    if middleware:
        # It puts tasks and functions of its own between the server and the page.
        app.middleware("http")(pass_on)
    with pytest.MonkeyPatch.context() as patch, serving(app, backend) as url:
        patch.setattr(status_stream, "LONGEST", 3600)
        yield page, f"{url}/topaz/events"


@pytest.mark.real_clock
@backends
@pytest.mark.parametrize("middleware", [False, True])
def test_a_stream_ends_in_order_when_the_server_stops(backend, middleware):
    """If the server had to cut it off, the client would get an error."""
    with contextlib.ExitStack() as server, httpx.Client(timeout=30) as client:
        page = streaming(backend, middleware=middleware)
        _, url = server.enter_context(page)
        with client.stream("GET", url) as response:
            chunks = response.iter_text()
            assert "retry" in next(chunks)
            server.close()
            rest = "".join(chunks)
    assert rest.endswith("\n\n")


@pytest.mark.real_clock
@backends
@pytest.mark.parametrize("middleware", [False, True])
def test_a_client_that_leaves_gives_its_place_back(backend, middleware):
    with (
        streaming(backend, middleware=middleware) as (page, url),
        httpx.Client(timeout=30) as client,
    ):
        for _ in range(3):
            with client.stream("GET", url) as response:
                # Kept, because httpx closes the connection with it.
                chunks = response.iter_text()
                assert "retry" in next(chunks)
                until(lambda: page._streams._running == 1)
            until(lambda: page._streams._running == 0)
