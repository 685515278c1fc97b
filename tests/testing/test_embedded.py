from __future__ import annotations

import asyncio
import os
import pathlib
import socket
import subprocess
import sys
import textwrap
import threading

import grpc
import psutil
import pytest
from aserto.authorizer.v2 import (
    AuthorizerStub,
    InfoRequest,
    ListPoliciesRequest,
)

from fastapi_topaz.testing import EmbeddedAuthorizer
from fastapi_topaz.testing.fixtures import (
    embedded_authorizer,
    embedded_authorizer_tls,
)
from kit.embedded import (
    OWN_SOCKET,
    ask,
    code_of,
    connect,
    decided,
    is_request,
    status_of,
)
from kit.waiting import until


pytestmark = pytest.mark.real_clock


# pytest finds a fixture by its name in the test module.
__all__ = ["embedded_authorizer", "embedded_authorizer_tls"]


def is_listening(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


# -- authentication


def test_the_api_key_and_the_tenant_are_required_except_for_info():
    guarded = EmbeddedAuthorizer({"app.GET.x": True}, api_key="k1", tenant_id="t1")
    with guarded, connect(guarded) as stub:
        options = guarded.options
        assert (options.api_key, options.tenant_id) == ("k1", "t1")
        assert ask(stub, metadata=options.metadata) == {"allowed": True}
        for headers, code in (
            ((), "UNAUTHENTICATED"),
            ((("authorization", "basic k2"),), "UNAUTHENTICATED"),
            ((("authorization", "bearer k1"),), "UNAUTHENTICATED"),
            ((("authorization", "Basic k1"),), "PERMISSION_DENIED"),
            (
                (("authorization", "basic k1"), ("aserto-tenant-id", "t2")),
                "PERMISSION_DENIED",
            ),
        ):
            assert code_of(stub.Is, is_request(), metadata=headers) == code
        listed = stub.ListPolicies
        assert code_of(listed, ListPoliciesRequest()) == "UNAUTHENTICATED"
        assert stub.Info(InfoRequest(), timeout=10).version


# -- TLS


@pytest.fixture
def tls(request):
    running = request.getfixturevalue("embedded_authorizer_tls")
    running.policies = {"app.GET.x": True}
    return running


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_tls_with_the_right_ca_works(tls, host):
    assert tls.options.insecure is False
    assert tls.options.cert_file_path == tls.ca_cert_path
    with connect(tls, url=f"{host}:{tls.port}") as stub:
        assert ask(stub) == {"allowed": True}


def test_tls_with_another_ca_fails(tls):
    with EmbeddedAuthorizer(tls=True) as other:
        assert other.ca_cert_path != tls.ca_cert_path
        with connect(tls, ca=other.ca_cert_path) as stub:
            code, details = status_of(stub.Is, is_request())
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "CERTIFICATE_VERIFY_FAILED" in details


def test_tls_keeps_its_ca_over_a_restart_and_deletes_it_at_the_end():
    authorizer = EmbeddedAuthorizer({"app.GET.x": True}, tls=True)
    assert authorizer.ca_cert_path is None
    with authorizer:
        path = authorizer.ca_cert_path
    with authorizer, connect(authorizer) as stub:
        assert authorizer.ca_cert_path == path
        assert ask(stub) == {"allowed": True}
    assert pathlib.Path(path).exists()
    del authorizer
    until(lambda: not pathlib.Path(path).parent.exists())


def test_tls_without_trustme_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "trustme", None)
    authorizer = EmbeddedAuthorizer(tls=True)
    with pytest.raises(ImportError, match=r"fastapi-topaz-pool\[testing\]"):
        authorizer.start()


# -- lifecycle


def test_constructing_starts_nothing():
    before = set(threading.enumerate()), psutil.Process().num_fds()
    authorizer = EmbeddedAuthorizer(tls=True)
    threads, fds = before
    # Some of gRPC's own earlier threads may have ended meanwhile.
    assert set(threading.enumerate()) <= threads
    assert psutil.Process().num_fds() <= fds
    for name in ("port", "url", "options"):
        with pytest.raises(RuntimeError, match="start"):
            getattr(authorizer, name)
    assert repr(authorizer) == "<EmbeddedAuthorizer port=0 stopped>"
    authorizer.stop()


@pytest.mark.parametrize(
    "arguments",
    [
        {"port": -1},
        {"port": 65536},
        {"max_concurrent_streams": 0},
        {"api_key": ""},
        {"tenant_id": "\n"},
    ],
)
def test_invalid_arguments_are_rejected_at_construction(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        EmbeddedAuthorizer(**arguments)


def test_a_single_str_is_rejected_as_identities():
    with pytest.raises(TypeError, match="identities must be"):
        EmbeddedAuthorizer(identities="rick")


def test_start_and_stop_are_idempotent_and_keep_the_port():
    authorizer = EmbeddedAuthorizer()
    assert authorizer.start() is authorizer.start()
    port = authorizer.port
    assert repr(authorizer) == f"<EmbeddedAuthorizer port={port} running>"
    with connect(authorizer) as stub:
        stub.Info(InfoRequest(), timeout=10)
    authorizer.stop()
    authorizer.stop()
    assert not is_listening(port)
    authorizer.start()
    assert authorizer.port == port
    with connect(authorizer) as stub:
        stub.Info(InfoRequest(), timeout=10)
    assert authorizer.connections_accepted == 2
    authorizer.stop()


def test_stop_closes_the_sockets_of_clients(authorizer):
    with socket.create_connection(("127.0.0.1", authorizer.port), timeout=5) as client:
        until(lambda: authorizer.connections_open == 1)
        authorizer.stop()
        assert authorizer.connections_open == 0
        try:
            while client.recv(4096):
                pass
        except ConnectionResetError:
            pass


def test_a_chosen_port_is_used_and_a_busy_port_is_an_error(authorizer):
    threads = threading.active_count()
    second = EmbeddedAuthorizer(port=authorizer.port)
    with pytest.raises(OSError, match="in use"):
        second.start()
    until(lambda: threading.active_count() <= threads)
    authorizer.stop()
    with second:
        assert second.url == authorizer.url
        assert is_listening(second.port)


def test_a_client_of_the_old_server_finds_the_new_one(authorizer):
    authorizer.policies = {"app.GET.x": True}
    with connect(authorizer) as stub:
        assert ask(stub) == {"allowed": True}
        authorizer.stop()
        authorizer.start()
        response = stub.Is(is_request(), timeout=20, wait_for_ready=True)
        assert decided(response) == {"allowed": True}


async def test_the_authorizer_is_an_async_context_manager_on_both_backends():
    async with EmbeddedAuthorizer({"app.GET.x": True}) as authorizer:
        with connect(authorizer) as stub:
            assert ask(stub) == {"allowed": True}
        port = authorizer.port
    assert not is_listening(port)


def test_two_authorizers_and_an_aio_client_share_one_process():
    async def client(url):
        async with grpc.aio.insecure_channel(url, options=OWN_SOCKET) as channel:
            stub = AuthorizerStub(channel)
            answers = await asyncio.gather(*[stub.Is(is_request()) for _ in range(20)])
            return {decided(answer)["allowed"] for answer in answers}

    async def both():
        return await asyncio.gather(client(yes.url), client(no.url))

    with (
        EmbeddedAuthorizer({"app.GET.x": True}) as yes,
        EmbeddedAuthorizer({"app.GET.x": False}) as no,
    ):
        assert asyncio.run(both()) == [{True}, {False}]
        assert yes.calls == no.calls == {"Is": 20}


# -- counting


def test_each_channel_with_its_own_subchannel_pool_is_a_socket(authorizer):
    channels = [grpc.insecure_channel(authorizer.url, OWN_SOCKET) for _ in range(10)]
    for channel in channels:
        AuthorizerStub(channel).Info(InfoRequest(), timeout=10)
        AuthorizerStub(channel).Info(InfoRequest(), timeout=10)
    assert authorizer.connections_accepted == authorizer.connections_open == 10
    for channel in channels[:4]:
        channel.close()
    until(lambda: authorizer.connections_open == 6)
    for channel in channels[4:]:
        channel.close()
    until(lambda: authorizer.connections_open == 0)
    assert authorizer.connections_accepted == 10


def test_channels_with_a_shared_subchannel_pool_are_one_socket(authorizer):
    channels = [grpc.insecure_channel(authorizer.url) for _ in range(10)]
    for channel in channels:
        AuthorizerStub(channel).Info(InfoRequest(), timeout=10)
    assert authorizer.connections_accepted == 1
    for channel in channels:
        channel.close()


def test_calls_are_counted_by_method_and_reset(authorizer, stub):
    authorizer.policies = {"app.GET.x": True}
    ask(stub)
    ask(stub)
    code_of(stub.Is, is_request("nope"))
    stub.Info(InfoRequest(), timeout=10)
    assert authorizer.calls == {"Is": 3, "Info": 1}
    authorizer.calls["Is"] = 99
    assert authorizer.calls["Is"] == 3
    assert authorizer.calls["Query"] == 0
    authorizer.reset_counters()
    assert authorizer.calls == {}
    assert authorizer.connections_accepted == 0
    assert authorizer.connections_open == 1


# -- leaks


@pytest.mark.parametrize("grace", [0.0, 1.0])
def test_fifty_starts_leak_no_descriptor_thread_or_port(grace):
    process = psutil.Process()
    authorizer = EmbeddedAuthorizer({"app.GET.x": True})

    def cycle():
        with connect(authorizer.start()) as stub:
            ask(stub)
            authorizer.stop(grace)

    for _ in range(3):
        cycle()
    fds, threads = process.num_fds(), threading.active_count()
    native = process.num_threads()
    for _ in range(50):
        cycle()
    until(lambda: process.num_fds() <= fds)
    until(lambda: threading.active_count() <= threads)
    # gRPC has a pool of non-Python threads, which grows by a few under load.
    assert process.num_threads() <= native + 8
    assert authorizer.connections_accepted == 53
    assert not is_listening(authorizer.port)


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        **options,
    )


def test_a_running_server_does_not_disturb_the_exit_of_python():
    done = python(
        "-c",
        textwrap.dedent("""
            import grpc
            from aserto.authorizer.v2 import AuthorizerStub, InfoRequest
            from fastapi_topaz.testing import EmbeddedAuthorizer

            authorizer = EmbeddedAuthorizer().start()
            channel = grpc.insecure_channel(authorizer.url)
            print(AuthorizerStub(channel).Info(InfoRequest(), timeout=10).version)
        """),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "embedded\n", "")


def test_the_package_needs_neither_pytest_nor_trustme():
    done = python(
        "-c",
        "import sys; sys.modules['pytest'] = sys.modules['trustme'] = None\n"
        "from fastapi_topaz.testing import EmbeddedAuthorizer\n"
        "with EmbeddedAuthorizer(): print('works')",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "works\n", "")


def test_the_fixtures_work_as_a_plugin(tmp_path):
    conftest = 'pytest_plugins = ["fastapi_topaz.testing.fixtures"]\n'
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent("""
            def test_plain(embedded_authorizer):
                assert embedded_authorizer.options.insecure
                assert embedded_authorizer.policies == {}

            def test_tls(embedded_authorizer_tls):
                assert embedded_authorizer_tls.options.cert_file_path
        """)
    )
    done = python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider"),
        cwd=tmp_path,
        # Without the plugins that happen to be installed here.
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr
