"""Test client certificates (mutual TLS), `server_name` and `authority`."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import grpc
import grpc.aio
import pytest
from aserto.authorizer.v2 import Decision, IsResponse
from cryptography.hazmat.primitives import serialization
from google.protobuf.wrappers_pb2 import StringValue

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectFailed,
    ConnectionPool,
    GrpcConnector,
    Target,
)
from kit.faultkit.tls import Certificate, tls
from kit.greeter import GreeterStub, greeter_server
from kit.h2peer import METHOD, SocketServer
from kit.secrets import KEY


pytestmark = [pytest.mark.real_clock, pytest.mark.uvloop]

V1_2, V1_3 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
CA = Certificate("ca", ca=True)
OTHER_CA = Certificate("another ca", ca=True)
MIDDLE = Certificate("middle ca", issuer=CA, ca=True)
SERVER = Certificate(issuer=CA)
CLIENT = Certificate("client", issuer=CA)
OTHER = Certificate("another client", issuer=CA)
BELOW = Certificate("client below", issuer=MIDDLE)
STRANGER = Certificate("stranger", issuer=OTHER_CA)
ANN = StringValue(value="Ann")
EXPIRED = Certificate("old client", issuer=CA, days=(-2, -1))


@pytest.fixture
def files(tmp_path):
    """Write the files of a client, and return them as options."""
    paths = {
        "cert_file_path": str(tmp_path / "ca.pem"),
        "client_cert_path": str(tmp_path / "client.pem"),
        "client_key_path": str(tmp_path / "client.key"),
    }
    (tmp_path / "ca.pem").write_bytes(CA.pem)
    write(paths, CLIENT)
    return paths


def write(paths, certificate, *above):
    put(paths["client_cert_path"], b"".join(c.pem for c in (certificate, *above)))
    put(paths["client_key_path"], certificate.private_pem)


def put(path, content):
    """Write *content*, or delete the file if it is None."""
    if content is None:
        Path(path).unlink()
    else:
        Path(path).write_bytes(content)


def grpc_server():
    """Return a gRPC server that requires a certificate of `CA`."""
    credentials = grpc.ssl_server_credentials(
        [(SERVER.private_pem, SERVER.pem)], CA.pem, require_client_auth=True
    )
    return greeter_server(credentials)


def pool_to(url, transport, **options):
    connector = GrpcConnector(Target(url=url, **options), transport)
    return ConnectionPool(
        connector=connector, min_connections=0, max_connections=1, max_retries=0
    )


async def refusal(url, transport, **options):
    """Return why a pool cannot connect."""
    async with pool_to(url, transport, **options) as pool:
        with pytest.raises(ConnectFailed) as caught:
            await pool.acquire(timeout=20)
    return caught.value


# -- mutual TLS ---------------------------------------------------------------------


async def test_a_grpc_server_sees_the_certificate_of_the_client(transport, files):
    with grpc_server() as greeter:
        pool = pool_to(greeter.url, transport, **files)
        async with pool, pool.acquire() as conn:
            stub = conn.stub(GreeterStub)
            assert await stub.SayHello(ANN) == StringValue(value="Hello, Ann")
    assert greeter.certificates == {CLIENT.pem}


@pytest.mark.parametrize("newest", [V1_2, V1_3])
async def test_calls_are_answered_with_each_version_of_tls(transport, files, newest):
    with SocketServer(tls=tls(SERVER, clients=CA, newest=newest)) as server:
        url = f"127.0.0.1:{server.port}"
        async with pool_to(url, transport, **files) as pool, pool.acquire() as conn:
            assert await conn.call(METHOD, b"x" * 10**5, timeout=20) == b"x" * 10**5


async def test_a_server_that_wants_no_certificate_is_served_too(transport, files):
    with SocketServer(tls=tls(SERVER)) as server:
        url = f"127.0.0.1:{server.port}"
        async with pool_to(url, transport, **files) as pool, pool.acquire() as conn:
            assert await conn.call(METHOD, b"x", timeout=20) == b"x"


async def test_the_certificates_above_that_of_the_client_are_sent(transport, files):
    with SocketServer(tls=tls(SERVER, clients=CA)) as server:
        url = f"127.0.0.1:{server.port}"
        write(files, BELOW, MIDDLE)
        async with pool_to(url, transport, **files) as pool, pool.acquire() as conn:
            assert await conn.call(METHOD, b"x", timeout=20) == b"x"
        write(files, BELOW)
        assert "refuses the client certificate" in str(
            await refusal(url, transport, **files)
        )


async def test_one_file_may_hold_the_certificate_and_its_key(transport, files):
    put(files["client_cert_path"], CLIENT.private_pem + CLIENT.pem)
    files["client_key_path"] = files["client_cert_path"]
    with SocketServer(tls=tls(SERVER, clients=CA)) as server:
        url = f"127.0.0.1:{server.port}"
        async with pool_to(url, transport, **files) as pool, pool.acquire() as conn:
            assert await conn.call(METHOD, b"x", timeout=20) == b"x"


async def test_the_files_are_read_again_for_each_connection(transport, files):
    with grpc_server() as greeter:
        async with pool_to(greeter.url, transport, **files) as pool:
            for certificate in (CLIENT, OTHER, CLIENT):
                write(files, certificate)
                pool.drain()
                async with pool.acquire() as conn:
                    await conn.stub(GreeterStub).SayHello(ANN)
                assert greeter.certificates == {certificate.pem}
                greeter.certificates.clear()


async def test_targets_do_not_share_their_certificates(transport, files, tmp_path):
    (tmp_path / "other").mkdir()
    others = {
        **files,
        "client_cert_path": str(tmp_path / "other" / "client.pem"),
        "client_key_path": str(tmp_path / "other" / "client.key"),
    }
    write(others, OTHER)
    with grpc_server() as greeter:
        for paths, certificate in ((files, CLIENT), (others, OTHER)):
            pool = pool_to(greeter.url, transport, **paths)
            async with pool, pool.acquire() as conn:
                await conn.stub(GreeterStub).SayHello(ANN)
            assert greeter.certificates == {certificate.pem}
            greeter.certificates.clear()
        only_ca = {"cert_file_path": files["cert_file_path"]}
        failed = await refusal(greeter.url, transport, **only_ca)
    assert "pass client_cert_path and client_key_path" in str(failed)


REFUSED = {"no trust": STRANGER, "expired": EXPIRED}


@pytest.mark.parametrize("newest", [V1_2, V1_3])
@pytest.mark.parametrize("kind", REFUSED)
async def test_a_refused_certificate_is_named(transport, files, kind, newest):
    write(files, REFUSED[kind])
    with SocketServer(tls=tls(SERVER, clients=CA, newest=newest)) as server:
        url = f"127.0.0.1:{server.port}"
        failed = await refusal(url, transport, **files)
        assert "the server refuses the client certificate" in str(failed)
        assert repr(files["client_cert_path"]) in str(failed)
        assert (failed.reason, failed.permanent) == ("tls", True)
        # A renewed certificate repairs it.
        write(files, CLIENT)
        async with pool_to(url, transport, **files) as pool, pool.acquire() as conn:
            assert await conn.call(METHOD, b"x", timeout=20) == b"x"


@pytest.mark.parametrize("newest", [V1_2, V1_3])
async def test_a_missing_certificate_leads_to_its_options(transport, files, newest):
    with SocketServer(tls=tls(SERVER, clients=CA, newest=newest)) as server:
        url = f"127.0.0.1:{server.port}"
        only_ca = {"cert_file_path": files["cert_file_path"]}
        failed = await refusal(url, transport, **only_ca)
    assert "requires a client certificate (mTLS): pass client_cert_path" in str(failed)
    assert (failed.reason, failed.permanent) == ("tls", True)


async def test_a_check_is_made_with_a_client_certificate(transport, files):
    answer = IsResponse(decisions=[Decision(decision="allowed", **{"is": True})])

    def script(server, number, _data):
        server.answer(number, answer.SerializeToString())

    with SocketServer(script, tls=tls(SERVER, clients=CA)) as server:
        pool = ConnectionPool(transport=transport, min_connections=0)
        url = f"127.0.0.1:{server.port}"
        pool.configure(AuthorizerOptions(url=url, **files))
        async with pool, pool.acquire() as conn:
            assert await conn.decisions(policy_path="app") == {"allowed": True}


# -- files that cannot be used ------------------------------------------------------


def encrypted():
    return CLIENT.key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )


def traditional():
    return CLIENT.key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.BestAvailableEncryption(b"password"),
    )


CERT, PRIVATE = "client_cert_path", "client_key_path"
BAD = {
    "certificate, missing": (CERT, None, "No such file"),
    "certificate, empty": (CERT, b"", "it is empty"),
    "certificate, BOM": (CERT, b"\xef\xbb\xbf" + CLIENT.pem, "byte order mark"),
    "certificate, DER": (CERT, CLIENT.der, "DER format"),
    "certificate, text": (CERT, b"hello", "no certificate in PEM format"),
    "certificate, key": (CERT, CLIENT.private_pem, "private key and no certificate"),
    "certificate, cut off": (CERT, CLIENT.pem[:-40], "damaged or cut off"),
    "certificate above, cut off": (CERT, CLIENT.pem + CA.pem[:-40], "damaged or cut"),
    "key, missing": (PRIVATE, None, "No such file"),
    "key, empty": (PRIVATE, b" \n", "it is empty"),
    "key, BOM": (PRIVATE, b"\xef\xbb\xbf" + CLIENT.private_pem, "byte order mark"),
    "key, text": (PRIVATE, b"hello", "no private key in PEM format"),
    "key, certificate": (PRIVATE, CLIENT.pem, "a certificate and no private key"),
    "key, encrypted": (PRIVATE, encrypted(), "the key is encrypted"),
    "key, encrypted in the old form": (PRIVATE, traditional(), "the key is encrypted"),
    "key, cut off": (PRIVATE, CLIENT.private_pem[:-60], "the key is damaged"),
    "key, of another": (PRIVATE, OTHER.private_pem, "not that of the certificate"),
    "certificate, of another": (CERT, OTHER.pem, "not that of the certificate"),
    "certificate, CA first": (CERT, CA.pem + CLIENT.pem, "(the first one in its file)"),
}


@pytest.mark.costly
@pytest.mark.parametrize("kind", BAD)
async def test_a_bad_file_stops_the_start_and_fails_connects(transport, files, kind):
    option, content, fault = BAD[kind]
    connector = GrpcConnector(Target(url="localhost:1", **files), transport)
    connector.validate()
    put(files[option], content)
    with pytest.raises(ValueError, match=option) as caught:
        connector.validate()
    with pytest.raises(ConnectFailed) as failed:
        await connector.connect(5)
    for error in (caught.value, failed.value):
        assert fault in str(error)
        assert repr(files[option]) in str(error)
        assert CLIENT.private_pem.splitlines()[1].decode() not in str(error)
    assert (failed.value.reason, failed.value.permanent) == ("tls", True)
    pool = ConnectionPool(connector=connector)
    with pytest.raises(ValueError, match=option):
        await pool.initialize()
    write(files, CLIENT)
    connector.validate()


@pytest.mark.parametrize("option", [CERT, PRIVATE])
@pytest.mark.parametrize("kind", ["directory", "pipe", "NUL"])
def test_a_path_that_is_no_file_is_named(transport, files, option, kind, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    files[option] = {
        "directory": str(tmp_path),
        "pipe": str(tmp_path / "pipe"),
        "NUL": f"{tmp_path}/\0",
    }[kind]
    connector = GrpcConnector(Target(url="localhost:1", **files), transport)
    with pytest.raises(ValueError, match=option) as caught:
        connector.validate()
    assert repr(files[option]) in str(caught.value)


# -- the options --------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Target, AuthorizerOptions])
@pytest.mark.parametrize(
    "wrong, error",
    [
        ({CERT: "c.pem"}, "must be given together"),
        ({PRIVATE: "c.key"}, "must be given together"),
        ({CERT: "c.pem", PRIVATE: "c.key", "insecure": True}, "exclude each other"),
        ({"server_name": "topaz", "insecure": True}, "exclude each other"),
        ({CERT: 3, PRIVATE: "c.key"}, "client_cert_path must be a str"),
        ({CERT: "c.pem", PRIVATE: b"c.key"}, "client_key_path must be a str"),
        *(
            ({"server_name": wrong}, "server_name must")
            for wrong in (
                *(3, b"topaz", "  ", "topaz:8282", "a b", "*.topaz", ".topaz", "a..b"),
                *("-a", "a-", "t\xf6paz", "a/b", "[::1]", "a\n", "x" * 64, "a." * 127),
            )
        ),
        *(
            ({"authority": wrong}, "authority must")
            for wrong in (
                *(3, b"topaz", "  ", "user@topaz", "a b", "a/b", "a:b", "a:99999"),
                *("a:1:2", "::1", "[::1", "t\xf6paz", "a\r\n", ":1", "a" * 300),
            )
        ),
    ],
    ids=repr,
)
def test_options_that_do_not_fit_are_refused(cls, wrong, error):
    with pytest.raises((TypeError, ValueError), match=error):
        cls(**{"url": "localhost:1"} | wrong)


def test_an_empty_text_counts_as_none_for_an_authorizer():
    empty = dict.fromkeys([CERT, PRIVATE, "server_name", "authority"], "")
    assert AuthorizerOptions(**empty) == AuthorizerOptions()


def test_paths_may_be_objects(tmp_path):
    paths = {CERT: tmp_path / "c.pem", PRIVATE: tmp_path / "c.key"}
    texts = {name: str(path) for name, path in paths.items()}
    assert Target(url="x:1", **paths) == Target(url="x:1", **texts)
    assert AuthorizerOptions(**paths).client_key_path == texts[PRIVATE]


# -- names --------------------------------------------------------------------------


class Named(SocketServer):
    """A TLS server for some names, which records the names that clients ask for."""

    def __init__(self, *names):
        self.asked = []
        context = tls(Certificate(issuer=CA, names=names))
        context.sni_callback = lambda _socket, name, _context: self.asked.append(name)
        super().__init__(tls=context)

    def authorities(self):
        return {
            value
            for peer in self.servers
            for headers in peer.headers.values()
            for key, value in headers
            if key == ":authority"
        }


@pytest.fixture
def trusted(files):
    return {"cert_file_path": files["cert_file_path"]}


async def exchange(server, transport, host="127.0.0.1", **options):
    url = f"{host}:{server.port}"
    async with pool_to(url, transport, **options) as pool, pool.acquire() as conn:
        assert await conn.call(METHOD, b"x", timeout=20) == b"x"


@pytest.mark.parametrize("host", ["127.0.0.1", "ipv4:127.0.0.1"])
async def test_the_server_name_is_the_name_of_the_certificate(transport, trusted, host):
    with Named("topaz.example") as server:
        await exchange(server, transport, host, server_name="topaz.example", **trusted)
        # It is also the authority, as in gRPC.
        assert server.authorities() == {"topaz.example"}
        assert set(server.asked) == {"topaz.example"}
        url = f"{host}:{server.port}"
        failed = await refusal(url, transport, **trusted)
        assert "is not valid for the name in url" in str(failed)
        failed = await refusal(url, transport, server_name="other.example", **trusted)
        assert "is not valid for server_name='other.example'" in str(failed)
        assert (failed.reason, failed.permanent) == ("tls", True)


async def test_the_server_name_may_be_an_address(transport, trusted):
    with Named("10.9.8.7") as server:
        await exchange(server, transport, server_name="10.9.8.7", **trusted)
        assert set(server.asked) == {None}  # RFC 6066, section 3: no address in it


@pytest.mark.parametrize("authority", ["policies.example", "a_b", "9.9.9.9"])
async def test_the_authority_does_not_change_the_name_of_the_certificate(
    transport, trusted, authority
):
    with Named("localhost") as server:
        await exchange(server, transport, "localhost", authority=authority, **trusted)
        assert server.authorities() == {authority}
        assert set(server.asked) == {"localhost"}
    with Named("policies.example") as server:
        url = f"127.0.0.1:{server.port}"
        options = {"authority": "policies.example", **trusted}
        failed = await refusal(url, transport, **options)
        assert "not valid for the name in url" in str(failed)


async def test_authority_and_server_name_together(transport, trusted):
    names = {"authority": "policies.example", "server_name": "topaz.example"}
    with Named("topaz.example") as server:
        await exchange(server, transport, **names, **trusted)
        assert server.authorities() == {"policies.example"}
        assert set(server.asked) == {"topaz.example"}


@pytest.mark.parametrize("authority", ["localhost:99", "LocalHost:99"])
async def test_the_authority_may_have_another_port(transport, trusted, authority):
    with Named("localhost") as server:
        await exchange(server, transport, "localhost", authority=authority, **trusted)
        assert server.authorities() == {authority}


OF_NATIVE_ALONE = ["policies.example:443", "[::1]", "[::1]:443", "10.0.0.1:1"]


@pytest.mark.parametrize("authority", OF_NATIVE_ALONE)
async def test_an_authority_that_grpcio_cannot_send_is_refused_at_the_door(
    trusted, authority
):
    with Named("localhost") as server:
        await exchange(server, "native", "localhost", authority=authority, **trusted)
        assert server.authorities() == {authority}
        options = {"url": f"localhost:{server.port}", "authority": authority, **trusted}
        with pytest.raises(ValueError, match="needs transport='native'"):
            GrpcConnector(Target(**options), "grpcio")
        pool = ConnectionPool(transport="grpcio")
        with pytest.raises(ValueError, match="needs transport='native'"):
            pool.configure(AuthorizerOptions(**options))
        assert pool.authorizer_options is None


@pytest.mark.parametrize("authority", [*OF_NATIVE_ALONE, "policies.example"])
async def test_without_tls_any_authority_is_sent(transport, authority):
    with SocketServer() as server:
        url = f"127.0.0.1:{server.port}"
        options = {"insecure": True, "authority": authority}
        async with pool_to(url, transport, **options) as pool, pool.acquire() as conn:
            assert await conn.call(METHOD, b"x", timeout=20) == b"x"
        sent = [dict(each) for each in server.servers[0].headers.values()]
        assert {headers[":authority"] for headers in sent} == {authority}


async def test_no_error_of_a_refused_connect_shows_metadata(transport, files):
    write(files, STRANGER)
    with SocketServer(tls=tls(SERVER, clients=CA)) as server:
        url = f"127.0.0.1:{server.port}"
        metadata = [("x-key", KEY)]
        failed = await refusal(url, transport, metadata=metadata, **files)
    assert KEY not in str(failed)
