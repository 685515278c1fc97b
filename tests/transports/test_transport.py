from __future__ import annotations

import contextlib

import anyio
import attrs
import grpc
import grpc.aio
import pytest
import trustme

from fastapi_topaz import ConnectFailed, ConnectionLost, Verdict
from fastapi_topaz.connector import GrpcConnector, chosen_transport
from fastapi_topaz.testing import EmbeddedAuthorizer
from kit.channels import PATIENCE, ask, connected, refused_by, threads
from kit.waiting import eventually


pytestmark = [pytest.mark.real_clock, pytest.mark.uvloop]


# -- one connection, one socket


async def test_each_connection_owns_one_socket(either_authorizer):
    async with contextlib.AsyncExitStack() as stack:
        connections = [
            await stack.enter_async_context(connected(either_authorizer.options))
            for _ in range(10)
        ]
        async with anyio.create_task_group() as tasks:
            for connection in connections * 5:
                tasks.start_soon(ask, connection)
        assert either_authorizer.connections_accepted == 10
        assert either_authorizer.connections_open == 10
        assert either_authorizer.calls["Info"] == 50
    await eventually(lambda: either_authorizer.connections_open == 0)
    assert either_authorizer.connections_accepted == 10


async def test_concurrently_made_connections_own_one_socket_each(either_authorizer):
    connections = []

    async def connect():
        connections.append(
            await GrpcConnector(either_authorizer.options.target).connect(10)
        )

    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(connect)
    assert either_authorizer.connections_accepted == 10
    for connection in connections:
        await connection.close(0)
    await eventually(lambda: either_authorizer.connections_open == 0)


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


async def test_the_name_localhost_works_like_the_address(either_authorizer):
    url = f"localhost:{either_authorizer.port}"
    async with connected(
        attrs.evolve(either_authorizer.options, url=url)
    ) as connection:
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


# -- probes


async def test_an_answered_probe_means_alive(either_authorizer):
    async with connected(either_authorizer.options) as connection:
        await connection.probe(5)
    assert either_authorizer.calls == {"Info": 1}


@pytest.mark.parametrize(
    "code", ["UNIMPLEMENTED", "UNAUTHENTICATED", "PERMISSION_DENIED"]
)
async def test_a_probe_rejected_by_the_server_means_alive(plaintext, code):
    async with connected(plaintext.options) as connection:
        plaintext.fail(code)
        await connection.probe(5)
    assert plaintext.calls == {"Info": 1}


async def test_a_probe_with_the_wrong_credentials_means_alive():
    with EmbeddedAuthorizer(api_key="right", tenant_id="t") as either_authorizer:
        options = attrs.evolve(either_authorizer.options, api_key="wrong")
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
        with pytest.raises(ConnectFailed, match=r"not an authorizer.*8282") as caught:
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


async def test_a_probe_of_a_frozen_server_means_dead_within_its_timeout(
    either_authorizer,
):
    async with connected(either_authorizer.options) as connection:
        either_authorizer.freeze()
        with anyio.fail_after(0.3 + PATIENCE):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await connection.probe(0.3)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        either_authorizer.thaw()
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


# -- which errors blame the connection


async def test_only_a_lost_connection_is_blamed_on_the_connection(plaintext):
    # gRPC does not tell whether the server sent this status, or was silent.
    is_native = chosen_transport(None) == "native"
    late = Verdict.ANSWERED if is_native else Verdict.SILENT
    async with connected(plaintext.options) as connection:
        for code, verdict in [
            ("UNAVAILABLE", Verdict.REFUSED),
            ("DEADLINE_EXCEEDED", late),
            ("PERMISSION_DENIED", Verdict.ANSWERED),
            ("INTERNAL", Verdict.ANSWERED),
            ("CANCELLED", Verdict.UNAVAILABLE),
        ]:
            plaintext.fail(code)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(connection)
            assert connection.judge(caught.value) is verdict, code
        assert connection.judge(ValueError("no")) is None


async def test_a_dropped_socket_fails_its_running_call(plaintext):
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


async def test_close_waits_for_calls_up_to_its_grace(plaintext):
    plaintext.delay = 0.3
    answers = []
    async with (
        connected(plaintext.options) as connection,
        anyio.create_task_group() as tasks,
    ):

        async def call():
            answers.append(await ask(connection))

        for _ in range(3):
            tasks.start_soon(call)
        await eventually(lambda: plaintext.streams == 3)
        with anyio.fail_after(PATIENCE):
            await connection.close(30)
    assert len(answers) == 3
    await eventually(lambda: plaintext.connections_open == 0)


async def test_close_ends_a_frozen_connection_after_its_grace(either_authorizer):
    lost = []
    async with connected(either_authorizer.options) as connection:
        either_authorizer.freeze()

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
    await eventually(lambda: either_authorizer.connections_open == 0)


async def test_a_cancelled_close_still_closes(plaintext):
    plaintext.delay = 30
    before = threads()
    lost = []
    async with connected(plaintext.options) as connection:

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
    assert scope.cancelled_caught
    assert lost == [True]
    await eventually(lambda: plaintext.connections_open == 0)
    await eventually(lambda: threads() <= before)


async def test_the_repr_names_the_target_and_no_secret():
    with EmbeddedAuthorizer(api_key="s3cret") as either_authorizer:
        connector = GrpcConnector(either_authorizer.options.target)
        async with connected(either_authorizer.options) as connection:
            for item in (connector, connection):
                assert either_authorizer.url in repr(item)
                assert "s3cret" not in repr(item)
            assert "open" in repr(connection)
        assert "closed" in repr(connection)
