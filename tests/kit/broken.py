"""
Broken set-ups for `doctor`, each with real servers.

A set-up is a context manager. It starts servers and yields the settings.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import socket
import ssl
import tempfile
from pathlib import Path

import anyio
import pytest

from fastapi_topaz._cli.doctor.context import Settings
from fastapi_topaz._cli.doctor.findings import Level
from fastapi_topaz._http2.tls import ROOTS_VARIABLE
from fastapi_topaz.testing import EmbeddedAuthorizer
from fastapi_topaz.testing._certs import Certificates

from .faultkit.frames import GOAWAY, SETTINGS, frame
from .faultkit.http2 import Http2Server
from .faultkit.names import Names
from .faultkit.proxy import Proxy
from .faultkit.tls import CLIENT_AUTH, Certificate, TlsServer, tls
from .faultkit.unavailable import http
from .secrets import KEY


POLICIES = {"myapp.GET.documents": True, "myapp.POST.documents": False}

# For steps that must end, however busy the machine is.
PATIENCE = 20.0
# For steps that must not end.
BRIEF = 1.0

SETUPS = {}


def problems(report):
    """Return the ids of the problems in *report*."""
    return {each.id for each in report.findings if each.level is Level.PROBLEM}


def setup(finding, *words):
    """Register a set-up, with the finding that names it and words of its remedy."""

    def register(make):
        SETUPS[make.__name__] = (contextlib.contextmanager(make), finding, words)
        return make

    return register


def plain(url, **more):
    return Settings(**{"url": url, "insecure": True, "timeout": PATIENCE, **more})


def secured(url, ca, **more):
    return Settings(
        **{"url": url, "cert_file_path": ca, "timeout": PATIENCE, **more},
    )


@contextlib.contextmanager
def file_with(data, name="file.pem"):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(data)
        yield str(path)


def authority(name="CA"):
    return Certificate(name, ca=True)


@contextlib.contextmanager
def authorizer_with(certificate, ca, **more):
    """Yield the address of an authorizer that serves TLS with this certificate."""
    with file_with(ca.pem) as path:
        running = EmbeddedAuthorizer(POLICIES, tls=True, **more)
        running._certificates = Certificates(
            path, certificate.private_pem, certificate.pem + ca.pem
        )
        with running:
            yield running, path


# -- no connection ------------------------------------------------------------------


@setup("configuration-invalid", "host:port", "without a scheme")
def a_url_with_a_scheme():
    yield plain("https://topaz.example:8282/authorizer")


@setup("configuration-invalid", "host:port")
def a_garbage_url():
    yield plain("!!", api_key=KEY)


@setup("configuration-invalid", "Drop --insecure", "the options of TLS")
def options_that_exclude_each_other():
    with EmbeddedAuthorizer(POLICIES) as running:
        yield plain(running.url, cert_file_path="/there/is/none.pem")


@setup("configuration-invalid", "both --client-cert and --client-key", "Correct")
def a_client_certificate_without_its_key():
    with EmbeddedAuthorizer(POLICIES) as running:
        yield plain(running.url, client_cert_path="client.pem")


@setup("configuration-invalid", "without line breaks")
def an_api_key_with_a_line_break():
    with EmbeddedAuthorizer(POLICIES) as running:
        yield plain(running.url, api_key=f"{KEY}\n")


@setup("configuration-invalid", "--server-name", "without a port")
def a_server_name_with_a_port():
    with EmbeddedAuthorizer(POLICIES) as running:
        yield plain(running.url, server_name="topaz:8282")


@setup("certificate-file-unusable", "path", "permissions")
def a_missing_certificate_file():
    with EmbeddedAuthorizer(POLICIES, tls=True) as running:
        yield secured(running.url, "/there/is/none.pem")


@setup("certificate-file-unusable", "PEM")
def a_damaged_certificate_file():
    with EmbeddedAuthorizer(POLICIES, tls=True) as running, file_with(b"?") as path:
        yield secured(running.url, path)


@setup("certificate-file-unusable", "replace it")
def a_client_key_that_is_none():
    with EmbeddedAuthorizer(POLICIES, tls=True) as running, file_with(b"?") as path:
        files = {"client_cert_path": running.ca_cert_path, "client_key_path": path}
        yield secured(running.url, running.ca_cert_path, **files)


@setup("dns-failed", "spelling", "resolver")
def a_name_that_does_not_exist():
    with resolving({"topaz.test": None}):
        yield plain("topaz.test:8282")


@setup("dns-timeout", "name servers", "/etc/resolv.conf")
def a_silent_name_server():
    with resolving({"topaz.test": ["127.0.0.1"]}) as names:
        names.silent()
        yield plain("topaz.test:8282", timeout=BRIEF)
        names.heal()


@contextlib.contextmanager
def resolving(names):
    """Let the resolver of this machine know *names*."""
    with (
        Names({name: ["127.0.0.1"] for name in names}) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(socket, "getaddrinfo", server.resolver(socket.getaddrinfo))
        for name, addresses in names.items():
            server.set(name, addresses)
        yield server


@contextlib.contextmanager
def bound():
    """Yield an address that refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@setup("tcp-refused", "Start Topaz", "--url", "8282")
def a_port_where_nothing_listens():
    with bound() as url:
        yield plain(url)


@setup("tcp-failed", "path of the socket")
def a_unix_socket_that_does_not_exist():
    yield plain("unix:/there/is/none.sock")


@setup("tcp-timeout", "firewall")
def a_black_hole():
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        # Linux drops the packets to a listener whose queue is full.
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        yield plain(f"127.0.0.1:{full.getsockname()[1]}", timeout=BRIEF)


# -- TLS ----------------------------------------------------------------------------


@setup("tls-unexpected-plaintext", "--insecure", "switch TLS on")
def no_tls_where_tls_is_expected():
    with EmbeddedAuthorizer(POLICIES) as running:
        yield Settings(url=running.url, timeout=PATIENCE)


@setup("tls-expected", "--insecure", "--cert")
def tls_where_plaintext_is_expected():
    with EmbeddedAuthorizer(POLICIES, tls=True) as running:
        yield plain(running.url)


@setup("certificate-expired", "Renew")
def an_expired_certificate():
    certificate = Certificate(issuer=(ca := authority()), days=(-9, -2))
    with authorizer_with(certificate, ca) as (running, path):
        yield secured(running.url, path)


@setup("certificate-not-yet-valid", "clock", "NTP")
def a_certificate_of_tomorrow():
    certificate = Certificate(issuer=(ca := authority()), days=(1, 2))
    with authorizer_with(certificate, ca) as (running, path):
        yield secured(running.url, path)


@setup("certificate-expired", "Renew", "holds: CA (expired on 20", "signed by CA.")
def an_expired_ca():
    ca = Certificate("CA", ca=True, days=(-9, -2))
    with authorizer_with(Certificate(issuer=ca), ca) as (running, path):
        yield secured(running.url, path)


@setup("certificate-wrong-name", "--server-name", "is for topaz.example.")
def a_certificate_for_another_name():
    certificate = Certificate(issuer=(ca := authority()), names=["topaz.example"])
    with authorizer_with(certificate, ca) as (running, path):
        yield secured(running.url, path)


@setup(
    *("certificate-unknown-ca", "file.pem' of --cert (cert_file_path) holds: another."),
    *("The server's certificate is signed by CA.", "grpc-ca.crt"),
)
def an_unknown_ca():
    with (
        authorizer_with(Certificate(issuer=(ca := authority())), ca) as (running, _),
        file_with(authority("another").pem) as path,
    ):
        yield secured(running.url, path, api_key=KEY)


@setup("certificate-unknown-ca", "The CA in the file has that name, but another key.")
def a_ca_that_was_created_again():
    with (
        authorizer_with(Certificate(issuer=(ca := authority())), ca) as (running, _),
        file_with(authority().pem) as path,
    ):
        yield secured(running.url, path)


@setup(
    "certificate-unknown-ca", "a.pem' of --cert", "topaz (not a CA, signed by other)"
)
def a_certificate_of_a_server_where_a_ca_is_expected():
    with (
        authorizer_with(Certificate(issuer=(ca := authority())), ca) as (running, _),
        file_with(Certificate(issuer=authority("other")).pem, "a.pem") as path,
    ):
        yield secured(running.url, path)


@setup("certificate-unknown-ca", "holds: A, B, C and 2 more. ")
def a_bundle_without_the_ca():
    bundle = b"".join(authority(name).pem for name in "ABCDE")
    with (
        authorizer_with(Certificate(issuer=(ca := authority())), ca) as (running, _),
        file_with(bundle) as path,
    ):
        yield secured(running.url, path)


@setup("certificate-unknown-ca", "Without --cert, only CAs that this system trusts")
def no_ca_file_at_all():
    with (
        EmbeddedAuthorizer(POLICIES, tls=True) as running,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.delenv(ROOTS_VARIABLE, raising=False)
        yield Settings(url=running.url, timeout=PATIENCE)


@setup("certificate-unknown-ca", "Without --cert, only CAs in the file", ROOTS_VARIABLE)
def no_ca_file_but_the_variable_of_grpc():
    with (
        EmbeddedAuthorizer(POLICIES, tls=True) as running,
        file_with(authority("another").pem) as path,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv(ROOTS_VARIABLE, path)
        yield Settings(url=running.url, timeout=PATIENCE)


@setup("certificate-not-acceptable", "server authentication")
def a_certificate_for_clients():
    ca = authority()
    certificate = Certificate(issuer=ca, extensions=[CLIENT_AUTH])
    with authorizer_with(certificate, ca) as (running, path):
        yield secured(running.url, path)


@contextlib.contextmanager
def tls_server(**settings):
    ca = authority()
    with (
        TlsServer(tls(Certificate(issuer=ca), **settings)) as server,
        file_with(ca.pem) as path,
    ):
        yield f"127.0.0.1:{server.port}", path


@setup("client-certificate-required", "--client-cert", "--client-key")
def a_server_with_mutual_tls():
    with tls_server(clients=authority("clients")) as (url, path):
        yield secured(url, path, api_key=KEY)


@setup(
    *("client-certificate-refused", "signed by a CA that the server trusts"),
    "of --client-cert (client_cert_path) holds: topaz (not a CA, signed by others).",
)
def a_client_certificate_of_another_ca():
    with tls_server(clients=authority("clients")) as (url, path):
        client = Certificate(issuer=authority("others"))
        with file_with(client.pem) as cert, file_with(client.private_pem) as key:
            yield secured(url, path, client_cert_path=cert, client_key_path=key)


@setup("alpn-missing", "HTTP/2", "ALPN")
def a_server_without_alpn():
    with tls_server(alpn=()) as (url, path):
        yield secured(url, path)


@setup("tls-version", "TLS 1.2")
def a_server_with_old_tls_only():
    settings = {"newest": ssl.TLSVersion.TLSv1_1, "ciphers": "ALL:@SECLEVEL=0"}
    with tls_server(**settings) as (url, path):
        yield secured(url, path)


@setup("tls-timeout", "not paused", "restart")
def a_frozen_server_with_tls():
    with EmbeddedAuthorizer(POLICIES, tls=True) as running:
        running.freeze()
        yield secured(running.url, running.ca_cert_path, timeout=BRIEF)


# -- what answers -------------------------------------------------------------------

PAGE = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@setup("http1-server", "8282", "gRPC (HTTP/2)")
def a_proxy_that_answers_http1():
    with TlsServer(reply=PAGE) as server:
        yield plain(f"127.0.0.1:{server.port}")


@setup("http1-server", "8282", "REST")
def a_web_server_where_tls_is_expected():
    with TlsServer(reply=PAGE) as server:
        yield Settings(url=f"127.0.0.1:{server.port}", timeout=PATIENCE, api_key=KEY)


@setup("not-http2", "8282")
def the_port_of_ssh():
    with TlsServer(reply=b"SSH-2.0-OpenSSH_9.7\r\n") as server:
        yield plain(f"127.0.0.1:{server.port}")


@setup("tls-not-spoken", "8282")
def the_port_of_ssh_where_tls_is_expected():
    with TlsServer(reply=b"SSH-2.0-OpenSSH_9.7\r\n") as server:
        yield Settings(url=f"127.0.0.1:{server.port}", timeout=PATIENCE)


@setup("closed-at-once", "look at its log")
def a_server_that_closes_at_once():
    with TlsServer() as server:
        yield plain(f"127.0.0.1:{server.port}")


@setup("closed-at-once", "look at its log")
def a_proxy_without_a_server_behind_it():
    with Proxy([]) as proxy:
        yield Settings(url=proxy.url, timeout=PATIENCE)


@setup("server-silent", "not paused", "restart")
def a_frozen_server():
    with EmbeddedAuthorizer(POLICIES) as running:
        running.freeze()
        yield plain(running.url, timeout=BRIEF)


@setup("server-goaway", "shutting down")
def a_server_that_says_goaway():
    frames = frame(SETTINGS, 0, 0) + frame(GOAWAY, 0, 0, bytes(8))
    with TlsServer(reply=frames) as server:
        yield plain(f"127.0.0.1:{server.port}")


@setup("authorizer-silent", "restart it")
def an_authorizer_that_hangs():
    with EmbeddedAuthorizer(POLICIES) as running:
        running.delay = 60
        yield plain(running.url, timeout=BRIEF)


@contextlib.contextmanager
def scripted(act, **settings):
    with Http2Server(**settings) as server:
        server._script(act, None)
        yield server


@setup("proxy-without-topaz", "behind it", "route")
def a_proxy_that_answers_502():
    with scripted(http(502)) as server:
        yield plain(server.url, api_key=KEY)


@setup("not-an-authorizer", "Another gRPC service", "8282")
def another_grpc_service():
    with scripted(lambda call: call.fail(12, "unknown service")) as server:
        yield plain(server.url)


@setup("authorizer-unavailable", "Start Topaz", "proxy")
def a_proxy_that_answers_unavailable():
    with scripted(lambda call: call.fail(14, "no healthy upstream")) as server:
        yield plain(server.url)


@setup("connection-lost", "log", "limits")
def a_server_that_cuts_calls_off():
    with Http2Server() as server:
        server.truncate()
        yield plain(server.url)


@setup("authorizer-error", "log of Topaz")
def an_authorizer_with_an_error():
    with EmbeddedAuthorizer(POLICIES) as running:
        running.fail("INTERNAL", f"the key is {KEY}")
        yield plain(running.url)


@setup("stream-limit-low", "max_connections", "100")
def a_stream_limit_of_one():
    with EmbeddedAuthorizer(POLICIES, max_concurrent_streams=1) as running:
        yield plain(running.url)


@setup("stream-limit-low", "max_connections")
def a_stream_limit_below_the_streams_of_the_pool():
    with EmbeddedAuthorizer(POLICIES, max_concurrent_streams=20) as running:
        yield plain(running.url, streams=50)


@setup("clock-skew", "NTP")
def a_clock_that_is_an_hour_late():
    with EmbeddedAuthorizer(POLICIES) as running:
        yield plain(running.url, now=lambda: now() - dt.timedelta(hours=1))


@setup("clock-skew", "NTP")
def a_clock_that_is_a_minute_early():
    with EmbeddedAuthorizer(POLICIES) as running:
        yield plain(running.url, now=lambda: now() + dt.timedelta(minutes=1))


def now():
    return dt.datetime.now(dt.UTC)


# -- credentials and policies -------------------------------------------------------


@setup("api-key-refused", "TOPAZ_API_KEY", "auth.keys")
def a_wrong_api_key():
    with EmbeddedAuthorizer(POLICIES, api_key="right") as running:
        yield plain(running.url, api_key=KEY)


@setup("api-key-missing", "TOPAZ_API_KEY")
def no_api_key():
    with EmbeddedAuthorizer(POLICIES, api_key="right") as running:
        yield plain(running.url)


@setup("permission-denied", "--tenant-id")
def a_wrong_tenant():
    with EmbeddedAuthorizer(POLICIES, tenant_id="right") as running:
        yield plain(running.url, tenant_id="wrong")


@setup("policies-missing", "bundle")
def no_policies():
    with EmbeddedAuthorizer() as running:
        yield plain(running.url, policy_root="myapp")


@setup("policy-root-missing", "--policy-root")
def a_wrong_policy_root():
    with EmbeddedAuthorizer(POLICIES) as running:
        yield plain(running.url, policy_root="my")


@setup(
    *("policy-missing", "The closest of the 2 packages: myapp.GET.documents, myapp.PO"),
    "Declare that package",
)
def a_missing_policy():
    with EmbeddedAuthorizer(POLICIES) as running:
        yield plain(running.url, policy_root="myapp", policy_path="myapp.GET.document")


@setup("policy-missing", "pass --policy-path 'myapp.GET.documents', which is a package")
def a_policy_path_with_the_decision():
    with EmbeddedAuthorizer(POLICIES) as running:
        yield plain(running.url, policy_path="myapp.GET.documents.allowed")


@setup("policy-missing", "its rule `allowed` is missing", "`default allowed := false`")
def a_policy_without_the_rule():
    with EmbeddedAuthorizer({"myapp.GET.documents": {"visible": True}}) as running:
        yield plain(running.url, policy_path="myapp.GET.documents")


@setup("credentials-failed", "Correct the callable")
def credentials_that_raise_an_error():
    def credentials():
        raise OSError(f"no answer for {KEY}")

    with EmbeddedAuthorizer(POLICIES) as running:
        yield plain(running.url, credentials=credentials)


@setup("credentials-failed", "did not return in time")
def credentials_that_hang():
    with EmbeddedAuthorizer(POLICIES) as running:
        yield plain(running.url, credentials=anyio.sleep_forever, timeout=BRIEF)


@setup("configuration-invalid", "--policy-root is the first part", "Correct the option")
def a_policy_root_that_is_not_rego():
    with EmbeddedAuthorizer(POLICIES) as running:
        yield plain(running.url, policy_root="my-app")


@setup("configuration-invalid", "the route GET /orders/{id} asks myapp.GET.orders.__id")
def a_policy_path_that_is_a_route():
    with EmbeddedAuthorizer(POLICIES) as running:
        yield plain(running.url, policy_path="GET /documents")
