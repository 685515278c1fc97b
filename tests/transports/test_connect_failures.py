"""Test connect attempts that fail or are cancelled."""

from __future__ import annotations

import contextlib
import socket
import threading

import anyio
import attrs
import pytest
import trustme

from fastapi_topaz import AuthorizerOptions, ConnectFailed
from fastapi_topaz.connector import GrpcConnector
from fastapi_topaz.testing import EmbeddedAuthorizer
from fastapi_topaz.testing._certs import Certificates
from kit.channels import PATIENCE, ask, connected, refused_by, threads
from kit.waiting import eventually


pytestmark = [pytest.mark.real_clock, pytest.mark.uvloop]


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
    """Serve a port that sends *data* to each client that sends, and then closes."""

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
            # A client that sends nothing ends this server.
            socket.create_connection(server.getsockname()).close()
            thread.join(10)
            assert not thread.is_alive()


# -- failed connects ----------------------------------------------------------------


@pytest.mark.parametrize("insecure", [True, False], ids=["plaintext", "tls"])
async def test_a_port_without_a_listener_refuses(insecure):
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
async def test_a_server_that_accepts_and_stays_silent_times_out(insecure):
    with bound() as server:
        error = await refused_by(to(server, insecure=insecure), timeout=0.5)
    assert (error.reason, error.permanent) == ("timeout", False)
    # gRPC has two texts for it.
    texts = ("stay silent", "sends nothing", "or send nothing")
    assert any(text in str(error) for text in texts)


async def test_a_frozen_server_times_out_and_leaves_no_socket(either_authorizer):
    either_authorizer.freeze()
    error = await refused_by(either_authorizer.options, timeout=0.5)
    assert (error.reason, error.permanent) == ("timeout", False)
    assert either_authorizer.connections_accepted >= 1
    await eventually(lambda: either_authorizer.connections_open == 0)


async def test_a_server_that_closes_the_connection_is_reported_as_such():
    with answering(b"") as server:
        error = await refused_by(to(server, insecure=True))
    assert (error.reason, error.permanent) == ("other", False)
    assert "closed the connection" in str(error)


@pytest.mark.parametrize(
    "insecure, reason", [(True, "other"), (False, "tls")], ids=["plaintext", "tls"]
)
async def test_an_http1_server_is_reported_as_not_grpc(insecure, reason):
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
    either_authorizer = EmbeddedAuthorizer(tls=True)
    either_authorizer._certificates = Certificates(
        path,
        server.private_key_pem.bytes(),
        server.cert_chain_pems[0].bytes(),
    )
    with either_authorizer:
        error = await refused_by(either_authorizer.options)
        await eventually(lambda: either_authorizer.connections_open == 0)
    assert (error.reason, error.permanent) == ("tls", True)
    assert "not valid for the name in url" in str(error)


async def test_a_plaintext_connect_error_says_that_the_server_may_use_tls(tls):
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


async def test_a_missing_certificate_file_is_a_configuration_error(tmp_path):
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


async def test_a_directory_as_certificate_file_is_rejected(tmp_path):
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
async def test_a_failed_connect_stops_trying_while_its_error_is_referenced(
    url, plaintext
):
    plaintext.stop()
    options = attrs.evolve(plaintext.options, url=url.format(port=plaintext.port))
    errors = [await refused_by(options) for _ in range(3)]
    plaintext.start()
    # gRPC would retry after 0.1 s, plus or minus a fifth. Waiting is the only way to
    # see that no retry happens.
    await anyio.sleep(0.5)
    assert plaintext.connections_accepted == 0
    assert [error.reason for error in errors] == ["refused"] * 3


# -- cancelled connects -------------------------------------------------------------


async def test_a_cancelled_connect_leaves_no_socket_and_no_thread(either_authorizer):
    either_authorizer.freeze()
    before = threads()
    ended = []

    async def connect(scope):
        with scope:
            # gRPC ends a handshake begun in plaintext only at the time limit of the
            # attempt.
            await GrpcConnector(either_authorizer.options.target).connect(2)
        ended.append(scope.cancelled_caught)

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            scopes = [anyio.CancelScope() for _ in range(3)]
            for scope in scopes:
                tasks.start_soon(connect, scope)
            await eventually(lambda: either_authorizer.connections_open == 3)
            for scope in scopes:
                scope.cancel()
    assert ended == [True] * 3
    await eventually(lambda: either_authorizer.connections_open == 0)
    await eventually(lambda: threads() <= before)


async def test_a_connect_cancelled_before_it_begins_does_nothing(plaintext):
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
        # Cancel at times below and above the duration of an attempt, in steps of 0.1
        # ms. A connection that was still made belongs to the caller.
        with anyio.move_on_after(step * 0.0001) as scope:
            with contextlib.suppress(ConnectFailed):
                connection = await GrpcConnector(plaintext.options.target).connect(1)
        if connection is None:
            assert scope.cancelled_caught or port == "refused"
        else:
            await connection.close(0)
    await eventually(lambda: plaintext.connections_open == 0)
    await eventually(lambda: threads() <= before)
