"""TLS of the HTTP/2 client: what is trusted, and what a failure says."""

from __future__ import annotations

import contextlib
import socket
import ssl

import anyio
import pytest

from fastapi_topaz._http2 import opening
from fastapi_topaz._http2 import tls as native_tls
from fastapi_topaz._http2.opening import NativeOpener
from fastapi_topaz._rpc.target import Target
from fastapi_topaz.exceptions import ConnectFailed
from kit.faultkit.tls import CLIENT_AUTH, Certificate, TlsServer, alert, key_usage, tls
from kit.h2peer import SocketServer, call, failure_of, opened


pytestmark = [pytest.mark.real_clock, pytest.mark.uvloop]

V1_1, V1_2 = ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2
CA = Certificate("ca", ca=True)
OTHER_CA = Certificate("another ca", ca=True)
NAMESAKE = Certificate("ca", ca=True)
GOOD = Certificate(issuer=CA)


@pytest.fixture(scope="module")
def ca_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("native") / "ca.pem"
    path.write_bytes(CA.pem)
    return str(path)


def target_of(server, ca_file, **options):
    return Target(url=f"localhost:{server.port}", cert_file_path=ca_file, **options)


@pytest.mark.parametrize("newest", [V1_2, ssl.TLSVersion.TLSv1_3])
async def test_calls_are_answered_over_tls(ca_file, newest):
    with SocketServer(tls=tls(GOOD, newest=newest)) as server:
        async with opened(target_of(server, ca_file)) as connection:
            for size in (0, 10, 100_000, 1_000_000):
                assert await call(connection, b"x" * size, 60) == b"x" * size


@pytest.mark.parametrize("url", ["127.0.0.1:{}", "ipv4:127.0.0.1:{}"])
async def test_a_certificate_may_be_for_an_address(ca_file, url):
    with SocketServer(tls=tls(GOOD)) as server:
        target = Target(url=url.format(server.port), cert_file_path=ca_file)
        async with opened(target) as connection:
            assert await call(connection, b"x") == b"x"


async def test_a_server_that_is_silent_in_the_handshake_yields_to_another(ca_file):
    with (
        SocketServer(tls=tls(GOOD)) as server,
        socket.create_server(("127.0.0.1", 0)) as silent,
    ):
        url = f"ipv4:127.0.0.1:{silent.getsockname()[1]},127.0.0.1:{server.port}"
        opener = NativeOpener(Target(url=url, cert_file_path=ca_file))
        for _ in range(6):
            with anyio.fail_after(5):
                connection = await opener.open(60.0)
            assert connection.peer == f"ipv4:127.0.0.1:{server.port}"
            await connection.close(0.0)


async def test_a_ca_without_key_identifiers_is_trusted(ca_file, monkeypatch):
    # As the one that Topaz makes. Python 3.13 is strict by default.
    context = native_tls.tls_context(Target(url="x:1", cert_file_path=ca_file))
    assert not context.verify_flags & ssl.VERIFY_X509_STRICT
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


async def test_close_says_close_notify_and_waits_for_none(ca_file):
    with TlsServer(tls(GOOD), reply=b"") as server:
        # It never answers with an ACK, so the connection does not become ready.
        failed = await failure_of(target_of(server, ca_file), 0.5)
        assert failed.reason == "timeout"
        assert "no answer" in str(failed)


FAULTS = {
    "expired": (
        lambda: tls(Certificate(issuer=CA, days=(-2, -1))),
        "has expired by the clock",
    ),
    "not yet valid": (
        lambda: tls(Certificate(issuer=CA, days=(1, 2))),
        "not yet valid by the clock",
    ),
    "another name": (
        lambda: tls(Certificate(issuer=CA, names=["x.example"])),
        "not valid for the name",
    ),
    "another CA": (lambda: tls(Certificate(issuer=OTHER_CA)), "not signed by a CA"),
    "self-signed": (lambda: tls(Certificate()), "not signed by a CA"),
    "a CA of the same name": (
        lambda: tls(Certificate(issuer=NAMESAKE)),
        "created again with another key",
    ),
    "for clients only": (
        lambda: tls(Certificate(issuer=CA, extensions=[CLIENT_AUTH])),
        "wrong purpose",
    ),
    "for signing only": (
        lambda: tls(
            Certificate(issuer=CA, extensions=[key_usage("key_cert_sign", "crl_sign")])
        ),
        "wrong purpose",
    ),
    "client certificate, TLS 1.3": (
        lambda: tls(GOOD, clients=CA),
        "requires a client certificate (mTLS)",
    ),
    "client certificate, TLS 1.2": (
        lambda: tls(GOOD, clients=CA, newest=V1_2),
        "requires a client certificate (mTLS)",
    ),
    "no ALPN": (lambda: tls(GOOD, alpn=()), "does not offer HTTP/2"),
    "another protocol": (lambda: tls(GOOD, alpn=["http/1.1"]), "does not offer HTTP/2"),
    "TLS 1.1": (
        lambda: tls(GOOD, newest=V1_1, ciphers="DEFAULT:@SECLEVEL=0"),
        "old versions of TLS",
    ),
}


@pytest.mark.parametrize("make, text", FAULTS.values(), ids=FAULTS)
async def test_a_fault_of_tls_is_named_and_permanent(ca_file, make, text):
    with SocketServer(tls=make()) as server:
        failed = await failure_of(target_of(server, ca_file))
    assert text in str(failed)
    assert (failed.reason, failed.permanent) == ("tls", True)


REPLIES = {
    "bad certificate": (alert(42), "requires a client certificate", "tls", True),
    "access denied": (alert(49), "requires a client certificate", "tls", True),
    "unknown name": (alert(112), "no certificate for the name in url", "tls", True),
    "no protocol": (alert(120), "does not offer HTTP/2", "tls", True),
    "internal error": (alert(80), "the TLS handshake failed", "tls", False),
    "nonsense": (b"\x16\x03\x03\x00\x04abcd", "TLS handshake failed", "tls", False),
    "HTTP/1.1": (
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        "does not speak TLS on this port",
        "tls",
        True,
    ),
    "SSH": (b"SSH-2.0-OpenSSH_9.6\r\n", "does not speak TLS", "tls", True),
}


@pytest.mark.parametrize(
    "reply, text, reason, permanent", REPLIES.values(), ids=REPLIES
)
async def test_a_reply_that_is_no_handshake_is_explained(
    ca_file, reply, text, reason, permanent
):
    with TlsServer(reply=reply) as server:
        failed = await failure_of(target_of(server, ca_file))
    assert text in str(failed)
    assert (failed.reason, failed.permanent) == (reason, permanent)


async def test_plaintext_to_a_tls_port_is_explained(ca_file):
    with SocketServer(tls=tls(GOOD)) as server:
        target = Target(url=f"localhost:{server.port}", insecure=True)
        assert "does it use TLS?" in str(await failure_of(target)) or (
            "is it using TLS?" in str(await failure_of(target))
        )


# -- which roots are trusted ----------------------------------------------


@pytest.fixture
def no_system_roots(monkeypatch):
    monkeypatch.setattr(native_tls, "_system_context", lambda: None)
    monkeypatch.delenv(native_tls.ROOTS_VARIABLE, raising=False)


async def test_the_roots_of_grpc_s_variable_are_trusted(
    ca_file, no_system_roots, monkeypatch
):
    monkeypatch.setenv(native_tls.ROOTS_VARIABLE, ca_file)
    with SocketServer(tls=tls(GOOD)) as server:
        async with opened(Target(url=f"localhost:{server.port}")) as connection:
            assert await call(connection, b"x") == b"x"


async def test_no_roots_at_all_are_an_error_with_its_remedy(no_system_roots):
    failed = await failure_of(Target(url="localhost:1"))
    assert "pass cert_file_path" in str(failed)
    assert (failed.reason, failed.permanent) == ("tls", True)
    with pytest.raises(ConnectFailed):
        NativeOpener(Target(url="localhost:1")).validate()


@pytest.mark.parametrize("content", [None, b"", b"nonsense"])
async def test_a_bad_file_of_grpc_s_variable_is_an_error(
    no_system_roots, monkeypatch, tmp_path, content
):
    path = tmp_path / "roots.pem"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv(native_tls.ROOTS_VARIABLE, str(path))
    failed = await failure_of(Target(url="localhost:1"))
    assert native_tls.ROOTS_VARIABLE in str(failed)
    assert failed.permanent


async def test_the_store_of_the_system_does_not_trust_anybody(monkeypatch):
    monkeypatch.delenv(native_tls.ROOTS_VARIABLE, raising=False)
    with SocketServer(tls=tls(GOOD)) as server:
        failed = await failure_of(Target(url=f"localhost:{server.port}"))
    assert "not signed by a CA that this system trusts" in str(failed) or (
        "no trusted root certificates" in str(failed)
    )


async def test_the_file_of_grpc_s_variable_is_named_if_it_has_another_ca(
    monkeypatch, tmp_path
):
    path = tmp_path / "roots.pem"
    path.write_bytes(OTHER_CA.pem)
    monkeypatch.setenv(native_tls.ROOTS_VARIABLE, str(path))
    with SocketServer(tls=tls(GOOD)) as server:
        failed = await failure_of(Target(url=f"localhost:{server.port}"))
    assert (
        "is not signed by a CA that GRPC_DEFAULT_SSL_ROOTS_FILE_PATH="
        f"{str(path)!r} holds; pass the PEM file of its CA as cert_file_path"
    ) in str(failed)


@pytest.mark.parametrize("value", [None, ""])
async def test_the_variable_of_grpc_is_not_named_if_it_is_not_set(monkeypatch, value):
    monkeypatch.setattr(native_tls, "_system_context", lambda: trusting(OTHER_CA))
    monkeypatch.delenv(native_tls.ROOTS_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(native_tls.ROOTS_VARIABLE, value)
    with SocketServer(tls=tls(GOOD)) as server:
        failed = await failure_of(Target(url=f"localhost:{server.port}"))
    assert "that this system trusts; pass the PEM file of its CA" in str(failed)


def trusting(ca):
    context = ssl.create_default_context(cadata=ca.pem.decode())
    context.set_alpn_protocols(["h2"])
    return context


async def test_a_file_that_becomes_invalid_fails_the_next_connect(tmp_path):
    path = tmp_path / "ca.pem"
    path.write_bytes(CA.pem)
    with SocketServer(tls=tls(GOOD)) as server:
        target = target_of(server, str(path))
        opener = NativeOpener(target)
        opener.validate()
        for content in (CA.pem[:-40], b"", None):
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content)
            failed = await failure_of(target)
            assert "cert_file_path must be a readable PEM file" in str(failed)
            assert (failed.reason, failed.permanent) == ("tls", True)
            with pytest.raises(ValueError, match="cert_file_path"):
                opener.validate()


async def test_a_rotated_file_is_read_at_the_next_connect(tmp_path):
    path = tmp_path / "ca.pem"
    path.write_bytes(OTHER_CA.pem)
    with SocketServer(tls=tls(GOOD)) as server:
        target = target_of(server, str(path))
        assert "not signed by a CA" in str(await failure_of(target))
        path.write_bytes(CA.pem)
        async with opened(target) as connection:
            assert await call(connection, b"x") == b"x"


async def test_roots_that_are_installed_later_are_used(monkeypatch, tmp_path):
    monkeypatch.delenv(native_tls.ROOTS_VARIABLE, raising=False)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "roots.pem"))
    native_tls._loaded_system_context.cache_clear()
    try:
        with SocketServer(tls=tls(GOOD)) as server:
            target = Target(url=f"localhost:{server.port}")
            assert "no trusted root certificates" in str(await failure_of(target))
            (tmp_path / "roots.pem").write_bytes(CA.pem)
            async with opened(target) as connection:
                assert await call(connection, b"x") == b"x"
    finally:
        native_tls._loaded_system_context.cache_clear()


async def test_a_complete_name_matches_a_certificate_without_its_dot(
    ca_file, monkeypatch
):
    resolve = socket.getaddrinfo

    def getaddrinfo(host, *args, **options):
        return resolve(host.removesuffix("."), *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with SocketServer(tls=tls(GOOD)) as server:
        target = Target(url=f"localhost.:{server.port}", cert_file_path=ca_file)
        async with opened(target) as connection:
            assert await call(connection, b"x") == b"x"


# -- what a server says before it closes ----------------------------------


class GoneSocket:
    """A socket to a TLS server in memory, which closes after *flights* flights."""

    def __init__(self, context, flights, said=b""):
        self.inbox, self.outbox = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.server = context and context.wrap_bio(self.inbox, self.outbox, True)
        self.flights = flights
        self.said = said

    def send(self, data):
        if not self.flights:
            raise BrokenPipeError
        self.flights -= 1
        self.inbox.write(bytes(data))
        with contextlib.suppress(ssl.SSLWantReadError):
            self.server.do_handshake()
        return len(data)

    def recv(self, _size):
        if self.flights or not self.said:
            return self.outbox.read()
        said, self.said = self.said, b""
        return said


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(anyio, "wait_readable", lambda _: anyio.lowlevel.checkpoint())


def session(ca_file):
    target = Target(url="localhost:1", cert_file_path=ca_file)
    return native_tls.TlsSession(native_tls.tls_context(target), "localhost")


async def test_a_wrong_certificate_is_the_reason_though_the_server_is_gone(
    ca_file, no_waiting
):
    server = GoneSocket(tls(Certificate(issuer=CA, days=(-2, -1))), flights=1)
    with pytest.raises(ssl.SSLCertVerificationError):
        await opening._shake_hands(server, session(ca_file))


@pytest.mark.parametrize("flights", [0, 1])
async def test_an_alert_is_the_reason_though_the_server_is_gone(
    ca_file, no_waiting, flights
):
    # TLS 1.2: the alert comes in plaintext, in place of a flight.
    server = GoneSocket(tls(GOOD, newest=V1_2), flights, alert(40))
    with pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"):
        await opening._shake_hands(server, session(ca_file))


async def test_without_an_alert_the_end_of_the_server_is_the_reason(
    ca_file, no_waiting
):
    with pytest.raises(ConnectionResetError):
        await opening._shake_hands(GoneSocket(tls(GOOD), 0), session(ca_file))


def shaken(ca_file):
    """Return the two ends of an established session in memory."""
    client, incoming, outgoing = session(ca_file), ssl.MemoryBIO(), ssl.MemoryBIO()
    server = tls(GOOD).wrap_bio(incoming, outgoing, server_side=True)
    while not client.is_established:
        client.handshake()
        incoming.write(client.to_send())
        with contextlib.suppress(ssl.SSLWantReadError):
            server.do_handshake()
        client.received(outgoing.read())
    return client, server, outgoing


@pytest.mark.parametrize("early", [False, True])
async def test_close_notify_that_comes_with_bytes_ends_the_session(ca_file, early):
    client, server, outgoing = shaken(ca_file)
    server.write(b"last")
    with contextlib.suppress(ssl.SSLWantReadError):
        server.unwrap()
    if early:
        client._incoming.write(outgoing.read())
        assert client.received_early() == b"last"
    else:
        assert client.received(outgoing.read()) == b"last"
    with pytest.raises(ConnectionResetError):
        client.raise_end()


async def test_an_alert_that_comes_with_bytes_ends_the_session(ca_file):
    # The server may keep its socket open, so that nothing else would tell.
    client, server, outgoing = shaken(ca_file)
    server.write(b"last")
    # A record that cannot be decrypted stands for an alert of the server.
    record = outgoing.read() + b"\x17\x03\x03\x00\x20" + bytes(32)
    assert client.received(record) == b"last"
    with pytest.raises(ssl.SSLError, match=r"BAD_RECORD|DECRYPTION_FAILED"):
        client.raise_end()
