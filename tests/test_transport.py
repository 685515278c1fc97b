from __future__ import annotations

import contextlib
import socket
import threading

import anyio
import attrs
import grpc
import grpc.aio
import pytest
import trustme
from waiting import eventually

from fastapi_topaz import AuthorizerOptions, ConnectFailed, ConnectionLost, Verdict
from fastapi_topaz._grpcio.connector import GrpcConnector
from fastapi_topaz.testing import EmbeddedAuthorizer
from fastapi_topaz.testing._certs import Certificates


pytestmark = [pytest.mark.real_clock, pytest.mark.uvloop]

INFO = "/aserto.authorizer.v2.Authorizer/Info"
# Seconds that a busy machine may take on top of a timeout.
PATIENCE = 10.0


@pytest.fixture(params=["plaintext", "tls"])
def authorizer(request):
    with EmbeddedAuthorizer(tls=request.param == "tls") as running:
        yield running


@pytest.fixture
def plaintext(embedded_authorizer):
    return embedded_authorizer


@pytest.fixture
def tls(embedded_authorizer_tls):
    return embedded_authorizer_tls


def threads():
    """All but those in which trio waits when it is a guest, as it is in tests."""
    every = threading.enumerate()
    return {thread for thread in every if not thread.name.startswith("Trio thread")}


@contextlib.asynccontextmanager
async def connected(options, timeout=10.0):
    connection = await GrpcConnector(options.target).connect(timeout)
    try:
        yield connection
    finally:
        with anyio.CancelScope(shield=True):
            await connection.close(0)


async def ask(connection, method=INFO, *, timeout=10.0):
    return await connection.call(method, b"", timeout=timeout, metadata=())


async def refused_by(options, timeout=5.0):
    """Return why a connect failed, which must not take much longer than *timeout*."""
    with anyio.fail_after(timeout + PATIENCE), pytest.raises(ConnectFailed) as caught:
        await GrpcConnector(options.target).connect(timeout)
    assert options.url in str(caught.value)
    return caught.value


def to(server, **changes):
    host, port = server.getsockname()
    return AuthorizerOptions(url=f"{host}:{port}", **changes)


@contextlib.contextmanager
def bound(*, listening=True):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:
            server.listen()
        yield server


@contextlib.contextmanager
def answering(data):
    """Serve a port that sends *data* to whoever says something, and hangs up."""

    def serve():
        while True:
            client, _ = server.accept()
            with client, contextlib.suppress(OSError):
                if not client.recv(65536):
                    return
                client.sendall(data)

    with bound() as server:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server
        finally:
            # A client that says nothing ends it.
            socket.create_connection(server.getsockname()).close()
            thread.join(10)
            assert not thread.is_alive()


# -- one connection, one socket


async def test_each_connection_owns_one_socket(authorizer):
    async with contextlib.AsyncExitStack() as stack:
        connections = [
            await stack.enter_async_context(connected(authorizer.options))
            for _ in range(10)
        ]
        async with anyio.create_task_group() as tasks:
            for connection in connections * 5:
                tasks.start_soon(ask, connection)
        assert authorizer.connections_accepted == 10
        assert authorizer.connections_open == 10
        assert authorizer.calls["Info"] == 50
    await eventually(lambda: authorizer.connections_open == 0)
    assert authorizer.connections_accepted == 10


async def test_connections_made_at_once_own_one_socket_each(authorizer):
    connections = []

    async def connect():
        connections.append(await GrpcConnector(authorizer.options.target).connect(10))

    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(connect)
    assert authorizer.connections_accepted == 10
    for connection in connections:
        await connection.close(0)
    await eventually(lambda: authorizer.connections_open == 0)


async def test_a_connection_is_ready_before_its_first_call(plaintext):
    async with connected(plaintext.options) as connection:
        assert plaintext.connections_accepted == 1
        assert plaintext.calls.total() == 0
        assert b"embedded" in await ask(connection)


async def test_connecting_sends_no_call_and_needs_no_answer(plaintext):
    plaintext.fail("UNAVAILABLE", "warming up")
    async with connected(plaintext.options) as connection:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(connection)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert plaintext.calls == {"Info": 1}


async def test_many_calls_share_the_socket_of_their_connection(plaintext):
    plaintext.delay = 0.5
    async with (
        connected(plaintext.options) as connection,
        anyio.create_task_group() as tasks,
    ):
        for _ in range(50):
            tasks.start_soon(ask, connection)
        await eventually(lambda: plaintext.streams == 50)
        assert plaintext.connections_open == 1


async def test_the_name_localhost_is_as_good_as_the_address(authorizer):
    url = f"localhost:{authorizer.port}"
    async with connected(attrs.evolve(authorizer.options, url=url)) as connection:
        assert b"embedded" in await ask(connection)


async def test_a_rotated_certificate_file_is_used_by_new_connections(tls, tmp_path):
    path = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(path))
    options = attrs.evolve(tls.options, cert_file_path=str(path))
    await refused_by(options)
    trusted = await anyio.Path(tls.ca_cert_path).read_bytes()
    await anyio.Path(path).write_bytes(trusted)
    async with connected(options) as connection:
        assert b"embedded" in await ask(connection)


# -- connect failures


@pytest.mark.parametrize("insecure", [True, False], ids=["plaintext", "tls"])
async def test_a_port_where_nothing_listens_refuses(insecure):
    with bound(listening=False) as server:
        error = await refused_by(to(server, insecure=insecure))
    assert (error.reason, error.permanent) == ("refused", False)
    assert "connection refused" in str(error)


async def test_a_stopped_server_refuses_until_it_is_back(plaintext):
    plaintext.stop()
    assert (await refused_by(plaintext.options)).reason == "refused"
    plaintext.start()
    async with connected(plaintext.options) as connection:
        assert b"embedded" in await ask(connection)


async def test_an_unknown_name_cannot_be_resolved():
    options = AuthorizerOptions(url="nope.invalid:8282", insecure=True)
    error = await refused_by(options)
    assert (error.reason, error.permanent) == ("resolve", False)
    assert "cannot be resolved" in str(error)


@pytest.mark.parametrize("insecure", [True, False], ids=["plaintext", "tls"])
async def test_a_server_that_accepts_and_never_speaks_times_out(insecure):
    with bound() as server:
        error = await refused_by(to(server, insecure=insecure), timeout=0.5)
    assert (error.reason, error.permanent) == ("timeout", False)
    assert "stay" in str(error)
    assert "silent" in str(error)


async def test_a_frozen_server_times_out_and_no_socket_stays(authorizer):
    authorizer.freeze()
    error = await refused_by(authorizer.options, timeout=0.5)
    assert (error.reason, error.permanent) == ("timeout", False)
    assert authorizer.connections_accepted >= 1
    await eventually(lambda: authorizer.connections_open == 0)


async def test_a_server_that_hangs_up_is_named_as_such():
    with answering(b"") as server:
        error = await refused_by(to(server, insecure=True))
    assert (error.reason, error.permanent) == ("other", False)
    assert "closed the connection" in str(error)


@pytest.mark.parametrize(
    "insecure, reason", [(True, "other"), (False, "tls")], ids=["plaintext", "tls"]
)
async def test_an_http1_server_is_no_grpc_server(insecure, reason):
    answer = (
        b"HTTP/1.1 400 Bad Request\r\n"
        b"Content-Type: text/plain\r\nContent-Length: 11\r\n"
        b"Connection: close\r\n\r\nBad Request"
    )
    with answering(answer) as server:
        error = await refused_by(to(server, insecure=insecure))
    assert (error.reason, error.permanent) == (reason, True)
    if insecure:
        assert "does not speak gRPC" in str(error)
    else:
        assert "insecure=True" in str(error)


@pytest.mark.parametrize("given", [True, False], ids=["another CA", "gRPC's roots"])
async def test_a_certificate_of_an_unknown_ca_is_refused(tls, tmp_path, given):
    path = None
    if given:
        path = str(tmp_path / "ca.pem")
        trustme.CA().cert_pem.write_to_path(path)
    error = await refused_by(attrs.evolve(tls.options, cert_file_path=path))
    assert (error.reason, error.permanent) == ("tls", True)
    assert "not signed by a CA" in str(error)
    assert "cert_file_path" in str(error)
    await eventually(lambda: tls.connections_open == 0)


async def test_a_certificate_for_another_name_is_refused(tmp_path):
    authority = trustme.CA()
    path = str(tmp_path / "ca.pem")
    authority.cert_pem.write_to_path(path)
    server = authority.issue_cert("topaz.example")
    authorizer = EmbeddedAuthorizer(tls=True)
    authorizer._certificates = Certificates(
        path,
        server.private_key_pem.bytes(),
        server.cert_chain_pems[0].bytes(),
    )
    with authorizer:
        error = await refused_by(authorizer.options)
        await eventually(lambda: authorizer.connections_open == 0)
    assert (error.reason, error.permanent) == ("tls", True)
    assert "not valid for the name in url" in str(error)


async def test_a_plaintext_client_is_told_that_the_server_may_use_tls(tls):
    error = await refused_by(
        attrs.evolve(tls.options, insecure=True, cert_file_path=None)
    )
    assert error.reason == "other"
    assert "is it using TLS? insecure=True was given" in str(error)


async def test_a_tls_client_never_falls_back_to_plaintext(plaintext):
    error = await refused_by(attrs.evolve(plaintext.options, insecure=False))
    assert (error.reason, error.permanent) == ("tls", True)
    assert "insecure=True" in str(error)
    assert plaintext.calls.total() == 0


async def test_a_missing_certificate_file_is_a_mistake_of_the_configuration(tmp_path):
    path = str(tmp_path / "none.pem")
    connector = GrpcConnector(AuthorizerOptions(cert_file_path=path).target)
    before = threads()
    with pytest.raises(ValueError, match="cert_file_path") as caught:
        connector.validate()
    assert path in str(caught.value)
    with pytest.raises(ConnectFailed, match="cert_file_path") as caught:
        await connector.connect(5)
    assert path in str(caught.value)
    assert caught.value.permanent
    await eventually(lambda: threads() <= before)


async def test_a_directory_is_no_certificate_file(tmp_path):
    connector = GrpcConnector(AuthorizerOptions(cert_file_path=tmp_path).target)
    with pytest.raises(ValueError, match="cert_file_path"):
        connector.validate()


async def test_a_file_without_a_certificate_is_refused(tls, tmp_path):
    path = tmp_path / "ca.pem"
    path.write_text("this is no certificate\n")
    options = attrs.evolve(tls.options, cert_file_path=str(path))
    with (
        anyio.fail_after(PATIENCE + 5),
        pytest.raises((ValueError, ConnectFailed)) as caught,
    ):
        await GrpcConnector(options.target).connect(5)
    assert "cert_file_path" in str(caught.value)
    assert str(path) in str(caught.value)


async def test_no_failed_attempt_shows_the_api_key():
    with bound(listening=False) as server:
        error = await refused_by(to(server, insecure=True, api_key="s3cret"))
    assert "s3cret" not in repr(error) + str(error)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:{port}", "ipv4:127.0.0.1:{port},127.0.0.2:{port}"]
)
async def test_a_failed_connect_does_not_go_on_trying_while_its_error_is_kept(
    url, plaintext
):
    plaintext.stop()
    options = attrs.evolve(plaintext.options, url=url.format(port=plaintext.port))
    errors = [await refused_by(options) for _ in range(3)]
    plaintext.start()
    # gRPC would try again after 0.1 s, more or less a fifth. What must not happen can
    # only be waited for.
    await anyio.sleep(0.5)
    assert plaintext.connections_accepted == 0
    assert [error.reason for error in errors] == ["refused"] * 3


# -- cancelled connects


async def test_a_cancelled_connect_leaves_no_socket_and_no_thread(authorizer):
    authorizer.freeze()
    before = threads()
    ended = []

    async def connect(scope):
        with scope:
            # gRPC ends a handshake that it began in plaintext only when the time of
            # the attempt is over.
            await GrpcConnector(authorizer.options.target).connect(2)
        ended.append(scope.cancelled_caught)

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            scopes = [anyio.CancelScope() for _ in range(3)]
            for scope in scopes:
                tasks.start_soon(connect, scope)
            await eventually(lambda: authorizer.connections_open == 3)
            for scope in scopes:
                scope.cancel()
    assert ended == [True] * 3
    await eventually(lambda: authorizer.connections_open == 0)
    await eventually(lambda: threads() <= before)


async def test_a_connect_that_is_cancelled_before_it_begins_does_nothing(plaintext):
    before = threads()
    connection = None
    with anyio.CancelScope() as scope:
        scope.cancel()
        connection = await GrpcConnector(plaintext.options.target).connect(5)
    if connection is not None:
        await connection.close(0)
    await eventually(lambda: plaintext.connections_open == 0)
    await eventually(lambda: threads() <= before)


@pytest.mark.parametrize("port", ["open", "refused", "frozen"])
async def test_a_connect_may_be_cancelled_at_any_moment(plaintext, port):
    if port == "refused":
        plaintext.stop()
    elif port == "frozen":
        plaintext.freeze()
    before = threads()
    for step in range(60):
        connection = None
        # Less and more than an attempt takes, in steps of 0.1 ms. A connection that
        # was made all the same is the caller's.
        with anyio.move_on_after(step * 0.0001) as scope:
            with contextlib.suppress(ConnectFailed):
                connection = await GrpcConnector(plaintext.options.target).connect(1)
        if connection is None:
            assert scope.cancelled_caught or port == "refused"
        else:
            await connection.close(0)
    await eventually(lambda: plaintext.connections_open == 0)
    await eventually(lambda: threads() <= before)


# -- probes


async def test_a_probe_that_is_answered_means_alive(authorizer):
    async with connected(authorizer.options) as connection:
        await connection.probe(5)
    assert authorizer.calls == {"Info": 1}


@pytest.mark.parametrize(
    "code", ["UNIMPLEMENTED", "UNAUTHENTICATED", "PERMISSION_DENIED"]
)
async def test_a_probe_that_the_server_refuses_means_alive(plaintext, code):
    async with connected(plaintext.options) as connection:
        plaintext.fail(code)
        await connection.probe(5)
    assert plaintext.calls == {"Info": 1}


async def test_a_probe_with_the_wrong_credentials_means_alive():
    with EmbeddedAuthorizer(api_key="right", tenant_id="t") as authorizer:
        options = attrs.evolve(authorizer.options, api_key="wrong")
        async with connected(options) as connection:
            await connection.probe(5)


async def test_a_probe_of_an_unavailable_server_means_dead(plaintext):
    async with connected(plaintext.options) as connection:
        plaintext.fail("UNAVAILABLE", "going down")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await connection.probe(5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert connection.judge(caught.value) is Verdict.REFUSED


async def test_the_first_probe_of_a_server_without_the_authorizer_is_permanent(
    plaintext,
):
    async with connected(plaintext.options) as connection:
        await connection.greet(5)
        plaintext.fail("PERMISSION_DENIED", methods=["Info"])
        await connection.greet(5)
        plaintext.fail("UNIMPLEMENTED", methods=["Info"])
        with pytest.raises(ConnectFailed, match=r"no authorizer.*8282") as caught:
            await connection.greet(5)
        assert caught.value.permanent
        assert caught.value.reason == "other"
    with pytest.raises(ConnectionLost):
        await connection.greet(5)


async def test_a_probe_of_a_stopped_server_means_dead(plaintext):
    async with connected(plaintext.options) as connection:
        plaintext.stop()
        with anyio.fail_after(5 + PATIENCE), pytest.raises(grpc.aio.AioRpcError):
            await connection.probe(5)


async def test_a_probe_of_a_frozen_server_means_dead_within_its_timeout(authorizer):
    async with connected(authorizer.options) as connection:
        authorizer.freeze()
        with anyio.fail_after(0.3 + PATIENCE):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await connection.probe(0.3)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        authorizer.thaw()
        await connection.probe(10)


async def test_a_cancelled_probe_does_no_harm(plaintext):
    async with connected(plaintext.options) as connection:
        plaintext.freeze()
        with anyio.fail_after(PATIENCE), anyio.move_on_after(0.1) as scope:
            await connection.probe(30)
        assert scope.cancelled_caught
        plaintext.thaw()
        await connection.probe(10)


async def test_a_probe_of_a_closed_connection_is_connection_lost(plaintext):
    connection = await GrpcConnector(plaintext.options.target).connect(5)
    await connection.close(0)
    with anyio.fail_after(PATIENCE), pytest.raises(ConnectionLost) as caught:
        await connection.probe(5)
    assert connection.judge(caught.value) is Verdict.BROKEN


# -- what accuses the connection


async def test_only_a_lost_connection_accuses_the_connection(plaintext):
    async with connected(plaintext.options) as connection:
        for code, verdict in [
            ("UNAVAILABLE", Verdict.REFUSED),
            ("DEADLINE_EXCEEDED", Verdict.SILENT),
            ("PERMISSION_DENIED", Verdict.ANSWERED),
            ("INTERNAL", Verdict.ANSWERED),
            ("CANCELLED", Verdict.UNAVAILABLE),
        ]:
            plaintext.fail(code)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(connection)
            assert connection.judge(caught.value) is verdict, code
        assert connection.judge(ValueError("no")) is None


async def test_a_dropped_socket_fails_the_call_that_was_using_it(plaintext):
    plaintext.delay = 30
    caught = []

    async with connected(plaintext.options) as connection:

        async def call():
            with pytest.raises(grpc.aio.AioRpcError) as info:
                await ask(connection, timeout=30)
            caught.append(info.value)

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(call)
                await eventually(lambda: plaintext.streams == 1)
                assert plaintext.drop_connections() == 1
        assert caught[0].code() is grpc.StatusCode.UNAVAILABLE
        assert connection.judge(caught[0]) is Verdict.BROKEN


# -- closing


async def test_close_waits_for_calls_as_long_as_its_grace(plaintext):
    plaintext.delay = 0.3
    answers = []
    connection = await GrpcConnector(plaintext.options.target).connect(5)

    async def call():
        answers.append(await ask(connection))

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(call)
        await eventually(lambda: plaintext.streams == 3)
        with anyio.fail_after(PATIENCE):
            await connection.close(30)
    assert len(answers) == 3
    await eventually(lambda: plaintext.connections_open == 0)


async def test_close_ends_a_frozen_connection_when_its_grace_is_over(authorizer):
    connection = await GrpcConnector(authorizer.options.target).connect(5)
    authorizer.freeze()
    lost = []

    async def call():
        with pytest.raises(ConnectionLost):
            await ask(connection, timeout=60)
        lost.append(True)

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            await anyio.wait_all_tasks_blocked()
            await connection.close(0.2)
    assert lost == [True]
    await eventually(lambda: authorizer.connections_open == 0)


async def test_a_cancelled_close_closes_all_the_same(plaintext):
    plaintext.delay = 30
    before = threads()
    connection = await GrpcConnector(plaintext.options.target).connect(5)
    lost = []

    async def call():
        with pytest.raises(ConnectionLost):
            await ask(connection, timeout=60)
        lost.append(True)

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            await eventually(lambda: plaintext.streams == 1)
            with anyio.move_on_after(0.1) as scope:
                await connection.close(60)
            # No call is left that gRPC would report to a closed loop.
            assert not connection._calls
    assert scope.cancelled_caught
    assert lost == [True]
    await eventually(lambda: plaintext.connections_open == 0)
    await eventually(lambda: threads() <= before)


async def test_the_repr_names_the_target_and_no_secret():
    with EmbeddedAuthorizer(api_key="s3cret") as authorizer:
        connector = GrpcConnector(authorizer.options.target)
        async with connected(authorizer.options) as connection:
            for item in (connector, connection):
                assert authorizer.url in repr(item)
                assert "s3cret" not in repr(item)
            assert "open" in repr(connection)
        assert "closed" in repr(connection)
