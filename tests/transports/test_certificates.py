"""Test that an unusable certificate file stops the start with the reason."""

from __future__ import annotations

import os
import textwrap

import pytest

from fastapi_topaz import AuthorizerOptions, ConnectFailed, ConnectionPool
from fastapi_topaz._rpc.certificates import root_certificates
from fastapi_topaz.connector import GrpcConnector
from kit.faultkit.tls import Certificate


pytestmark = pytest.mark.real_clock

CA, OTHER = Certificate("ca", ca=True), Certificate("another ca", ca=True)
BEGIN, END = b"-----BEGIN CERTIFICATE-----\n", b"-----END CERTIFICATE-----\n"
LINES = CA.pem.splitlines(keepends=True)
NOT_BASE64 = BEGIN + b"this is not base64!\n" + END
NO_CERTIFICATE = BEGIN + b"QUJDREVGR0hJSktM\n" + END

GOOD = {
    "one": CA.pem,
    "two": OTHER.pem + CA.pem,
    "the same twice": CA.pem + CA.pem,
    "CRLF": CA.pem.replace(b"\n", b"\r\n"),
    "comments": "# F\u0151tan\u00fas\u00edtv\u00e1ny\n".encode() + CA.pem + b"# end",
    "with its key": CA.private_pem + CA.pem,
    "no line end": CA.pem.rstrip(),
}
BAD = {
    "empty": (b"", "it is empty"),
    "blank": (b" \n\n", "it is empty"),
    "BOM": (b"\xef\xbb\xbf" + CA.pem, "byte order mark"),
    "BOM, two": (b"\xef\xbb\xbf" + OTHER.pem + CA.pem, "byte order mark"),
    "UTF-16": (CA.pem.decode().encode("utf-16"), "byte order mark"),
    "DER": (CA.der, "it is in DER format"),
    "key": (CA.private_pem, "a private key and no certificate"),
    "request": (CA.pem.replace(b"CERTIFICATE", b"CERTIFICATE REQUEST"), "something el"),
    "text": (b"hello\n", "no certificate in PEM format"),
    "binary": (bytes(range(256)), "no certificate in PEM format"),
    "indented": (textwrap.indent(CA.pem.decode(), "  ").encode(), "start of a line"),
    "not base64": (NOT_BASE64, "damaged or cut off"),
    "no certificate": (NO_CERTIFICATE, "damaged or cut off"),
    "escaped": (CA.pem.replace(b"\n", b"\\n"), "damaged or cut off"),
    "cut off": (b"".join(LINES[:-2]), "damaged or cut off"),
    "no end": (b"".join(LINES[:-1]), "damaged or cut off"),
    # gRPC would use the first certificate and silently ignore the others.
    "second is bad": (CA.pem + NO_CERTIFICATE, "damaged or cut off"),
    "second cut off": (CA.pem + b"".join(LINES[:-2]), "damaged or cut off"),
    "first is bad": (NO_CERTIFICATE + CA.pem, "damaged or cut off"),
}


@pytest.mark.parametrize("kind", GOOD)
def test_certificates_in_pem_format_are_accepted(kind, tmp_path):
    path = tmp_path / "ca.pem"
    path.write_bytes(GOOD[kind])
    options = AuthorizerOptions(cert_file_path=path)
    GrpcConnector(options.target).validate()
    assert root_certificates(options.target) == GOOD[kind]


@pytest.mark.parametrize("kind", BAD)
async def test_a_bad_certificate_file_stops_the_start(kind, tmp_path):
    content, fault = BAD[kind]
    path = tmp_path / "ca.pem"
    path.write_bytes(content)
    pool = ConnectionPool()
    pool.configure(AuthorizerOptions(cert_file_path=path))
    with pytest.raises(ValueError, match="cert_file_path") as caught:
        await pool.initialize()
    assert fault in str(caught.value)
    assert repr(str(path)) in str(caught.value)


@pytest.mark.parametrize("kind", ["key", "with its key"])
def test_no_private_key_is_shown(kind, tmp_path):
    path = tmp_path / "ca.pem"
    path.write_bytes(CA.private_pem + NOT_BASE64 * (kind == "with its key"))
    with pytest.raises(ValueError, match="cert_file_path") as caught:
        root_certificates(AuthorizerOptions(cert_file_path=path).target)
    assert CA.private_pem.splitlines()[1].decode() not in str(caught.value)


@pytest.mark.parametrize(
    "path, fault",
    [
        ("{tmp}/none.pem", "No such file"),
        ("{tmp}", "Is a directory"),
        ("{tmp}/pipe", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("{tmp}/loop", "symbolic links"),
        ("{tmp}/nul\0", "null"),
        ("{tmp}/" + "x" * 300, "too long"),
        ("{tmp}/forbidden", "Permission denied"),
    ],
)
def test_an_unreadable_path_is_named(path, fault, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "forbidden").write_bytes(CA.pem)
    read = type(tmp_path).read_bytes

    def forbidden(self):  # root may read all files
        if self.name == "forbidden":
            raise PermissionError(13, "Permission denied", str(self))
        return read(self)

    monkeypatch.setattr(type(tmp_path), "read_bytes", forbidden)
    path = path.format(tmp=tmp_path)
    connector = GrpcConnector(AuthorizerOptions(cert_file_path=path).target)
    with pytest.raises(ValueError, match="cert_file_path") as caught:
        connector.validate()
    assert fault in str(caught.value)
    assert repr(path) in str(caught.value)


async def test_a_file_that_becomes_invalid_fails_the_next_connect_and_recovers(
    tmp_path, embedded_authorizer_tls
):
    path = tmp_path / "ca.pem"
    options = embedded_authorizer_tls.options
    good = (tmp_path / options.cert_file_path).read_bytes()
    connector = GrpcConnector(
        AuthorizerOptions(url=options.url, cert_file_path=path).target
    )
    path.write_bytes(good)
    connector.validate()
    path.write_bytes(good[:-40])
    with pytest.raises(ConnectFailed, match="damaged or cut off") as caught:
        await connector.connect(5)
    assert (caught.value.reason, caught.value.permanent) == ("tls", True)
    path.write_bytes(good)
    connection = await connector.connect(5)
    await connection.close(0)
