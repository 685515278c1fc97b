"""Test the error of a failed connect for each kind of TLS fault."""

from __future__ import annotations

import ssl
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from fastapi_topaz import AuthorizerOptions, ConnectFailed, ConnectionPool
from fastapi_topaz.connector import GrpcConnector
from kit.faultkit.tls import (
    CLIENT_AUTH,
    SETTINGS,
    Certificate,
    TlsServer,
    alert,
    key_usage,
    tls,
)


pytestmark = pytest.mark.real_clock

SECRET = "open-sesame"
V1_1, V1_2 = ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2
CA = Certificate("ca", ca=True)
OTHER_CA = Certificate("another ca", ca=True)
NAMESAKE = Certificate("ca", ca=True)
EXPIRED_CA = Certificate("old ca", issuer=CA, ca=True, days=(-2, -1))
NO_CA = Certificate("no ca", issuer=CA)
GOOD = Certificate(issuer=CA)
PAST, FUTURE = (-2, -1), (1, 2)
HEADERS = 1
CONNECTING = {4, 6, 8}
"""Frames that a client sends before its first call: SETTINGS, PING, WINDOW_UPDATE."""


def server_hello(minor):
    """Return the greeting of a server that only supports TLS 1.*minor* - 1."""
    hello = bytes([3, minor]) + bytes(32) + b"\x00\xc0\x13\x00"
    hello = b"\x02" + len(hello).to_bytes(3, "big") + hello
    return bytes([22, 3, minor]) + len(hello).to_bytes(2, "big") + hello


def signed(**options):
    return tls(Certificate(issuer=CA, **options))


# The behaviour of a server, and the required error text. All of these speak TLS.
SPEAK_TLS = {
    "expired": (lambda: signed(days=PAST), "has expired by the clock of this machine"),
    "not yet valid": (lambda: signed(days=FUTURE), "not yet valid by the clock"),
    "a CA that expired": (
        lambda: tls(Certificate(issuer=EXPIRED_CA), EXPIRED_CA),
        "has expired by the clock of this machine",
    ),
    "another name": (
        lambda: signed(names=["topaz.example"]),
        "not valid for the name in url",
    ),
    "another address": (
        lambda: signed(names=["127.0.0.9"]),
        "not valid for the name in url",
    ),
    "another CA": (
        lambda: tls(Certificate(issuer=OTHER_CA), OTHER_CA),
        "not signed by a CA",
    ),
    "another CA that is not sent": (
        lambda: tls(Certificate(issuer=OTHER_CA)),
        "not signed by a CA",
    ),
    "self-signed": (lambda: tls(Certificate()), "not signed by a CA"),
    "a CA of the same name": (
        lambda: tls(Certificate(issuer=NAMESAKE)),
        "created again with another key",
    ),
    "signed by no CA": (
        lambda: tls(Certificate(issuer=NO_CA), NO_CA),
        "gRPC refuses the server's certificate",
    ),
    "for clients only": (
        lambda: signed(extensions=[CLIENT_AUTH]),
        "wrong purpose",
    ),
    "for signing only": (
        lambda: signed(extensions=[key_usage("key_cert_sign", "crl_sign")]),
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
    "no common cipher": (
        lambda: tls(GOOD, newest=V1_2, ciphers="AES128-SHA256"),
        "refused the TLS handshake",
    ),
    "no common kind of key": (
        lambda: signed(ed25519_key=True),
        "refused the TLS handshake",
    ),
}
ALERTS = {
    "answers with TLS 1.0": (server_hello(1), "old versions of TLS"),
    "answers with TLS 1.1": (server_hello(2), "old versions of TLS"),
    "bad certificate": (alert(42), "requires a client certificate (mTLS)"),
    "access denied": (alert(49), "requires a client certificate (mTLS)"),
    "certificate required": (alert(116), "requires a client certificate (mTLS)"),
    "unknown name": (alert(112), "no certificate for the name in url"),
    "no protocol": (alert(120), "does not offer HTTP/2"),
    "internal error": (alert(80), "the TLS handshake failed"),
    "ends the handshake": (b"\x15\x03\x03\x00\x02\x01\x00", "the TLS handshake failed"),
    "nonsense": (b"\x16\x03\x03\x00\x04abcd", "the TLS handshake failed"),
}
PLAINTEXT = {
    "HTTP/2": SETTINGS,
    "HTTP/1.1": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
}


@pytest.fixture(scope="module")
def ca_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tls") / "ca.pem"
    path.write_bytes(CA.pem)
    return str(path)


async def refused_by_tls(server, ca_path, **options):
    """Make a call through a pool with a key, and return the connect error."""
    options = {"url": f"127.0.0.1:{server.port}", "cert_file_path": ca_path, **options}
    pool = ConnectionPool(
        min_connections=0, connection_timeout=5, acquire_timeout=20, max_retries=0
    )
    pool.configure(AuthorizerOptions(api_key=SECRET, tenant_id=SECRET, **options))
    async with pool:
        with pytest.raises(ConnectFailed) as caught:
            async with pool.acquire() as conn:
                await conn.decisions(policy_path="app.GET.x", timeout=5)
    assert SECRET not in str(caught.value)
    return caught.value


def frames(sent):
    """Return the kinds of the HTTP/2 frames that a client has *sent*."""
    sent = sent.removeprefix(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    kinds = set()
    while len(sent) >= 9:
        kinds.add(sent[3])
        sent = sent[9 + int.from_bytes(sent[:3], "big") :]
    return kinds


def told_nothing(server):
    """Return whether the server got no call. A call would carry the key."""
    # The key is compressed in its headers, so a search for its text finds nothing.
    return frames(server.decrypted) <= CONNECTING and b"PRI" not in server.clear


OF_GRPCIO = {
    # OpenSSL supports this kind of key, and gRPC's BoringSSL does not.
    "no common kind of key",
    # Its text is that of gRPC.
    "signed by no CA",
    # For OpenSSL this is the end of the connection.
    "ends the handshake",
}


def each(kinds):
    marks = pytest.mark.grpcio
    return pytest.mark.parametrize(
        "kind",
        [
            pytest.param(kind, marks=marks if kind in OF_GRPCIO else ())
            for kind in kinds
        ],
    )


@each(SPEAK_TLS)
async def test_each_tls_fault_is_named(kind, ca_path):
    make, said = SPEAK_TLS[kind]
    with TlsServer(make()) as server:
        error = await refused_by_tls(server, ca_path)
    assert said in str(error)
    assert (error.reason, error.permanent) == ("tls", True)
    assert "insecure=True" not in str(error)
    assert told_nothing(server)


@each(ALERTS)
async def test_each_handshake_refusal_is_named(kind, ca_path):
    reply, said = ALERTS[kind]
    with TlsServer(reply=reply) as server:
        error = await refused_by_tls(server, ca_path)
    assert said in str(error)
    assert error.reason == "tls"
    assert "insecure=True" not in str(error)
    assert told_nothing(server)


@pytest.mark.parametrize("kind", PLAINTEXT)
async def test_only_a_server_without_tls_leads_to_a_hint_at_insecure(kind, ca_path):
    with TlsServer(reply=PLAINTEXT[kind]) as server:
        error = await refused_by_tls(server, ca_path)
    assert "does not speak TLS on this port" in str(error)
    assert "pass insecure=True" in str(error)
    assert (error.reason, error.permanent) == ("tls", True)
    assert told_nothing(server)


# `tests/_http2/test_tls.py` has the roots of the native transport.
@pytest.mark.grpcio
async def test_the_default_roots_of_grpc_reject_a_private_ca():
    with TlsServer(tls(GOOD)) as server:
        error = await refused_by_tls(server, None)
    assert "not signed by a CA that gRPC ships" in str(error)
    assert "cert_file_path" in str(error)
    assert told_nothing(server)


async def test_a_server_closing_a_handshake_leads_to_a_client_cert_hint(ca_path):
    with TlsServer() as server:
        error = await refused_by_tls(server, ca_path)
    assert "closed the connection before it was ready" in str(error)
    assert "client certificate" in str(error)
    assert "insecure=True" not in str(error)


async def test_a_grpc_server_requiring_client_certs_leads_to_that_hint(ca_path):
    # The server sends no alert, so a client cannot be sure.
    server = grpc.server(ThreadPoolExecutor(1))
    credentials = grpc.ssl_server_credentials(
        [(GOOD.private_pem, GOOD.pem)], CA.pem, require_client_auth=True
    )
    server.port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        error = await refused_by_tls(server, ca_path)
    finally:
        server.stop(0).wait()
    assert "client certificate (mTLS)" in str(error)
    assert "insecure=True" not in str(error)


@pytest.mark.parametrize("context", [lambda: tls(GOOD), lambda: tls(GOOD, clients=CA)])
async def test_a_plaintext_connect_to_a_tls_server_leads_to_a_tls_hint(context):
    with TlsServer(context()) as server:
        error = await refused_by_tls(server, None, insecure=True)
    assert "is it using TLS? insecure=True was given" in str(error)
    assert server.handshakes == 0
    assert server.clear.startswith(b"PRI")
    assert frames(server.clear) <= CONNECTING


# This server never acknowledges SETTINGS, so the native transport finds it not ready.
@pytest.mark.grpcio
async def test_a_correct_server_of_the_kit_gets_calls(ca_path):
    options = {"cert_file_path": ca_path, "api_key": SECRET}
    with TlsServer(tls(GOOD)) as server:
        url = f"127.0.0.1:{server.port}"
        connector = GrpcConnector(AuthorizerOptions(url=url, **options).target)
        connection = await connector.connect(5)
        with pytest.raises(grpc.aio.AioRpcError):
            await connection.call("/a/b", b"", timeout=0.3, metadata=())
        await connection.close(0)
    assert server.handshakes == 1
    assert HEADERS in frames(server.decrypted)
