"""gRPC through a proxy, and several replicas behind one proxy."""

from __future__ import annotations

import gc

import anyio
import grpc
import pytest
from aserto.authorizer.v2 import AuthorizerStub, InfoRequest, IsRequest
from aserto.authorizer.v2.api import IdentityContext, PolicyContext

from fastapi_topaz import ConnectionPool
from kit.faultkit.proxy import Proxy
from kit.faultkit.replicas import Replicas
from kit.network_of_proxies import HOURS, is_reset, port_of
from kit.waiting import until


pytestmark = pytest.mark.real_clock


CHANNEL = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
]


REQUEST = IsRequest(
    policy_context=PolicyContext(path="app.x", decisions=["allowed"]),
    identity_context=IdentityContext(type=1),  # type: ignore[arg-type]
)


# -- stopping -----------------------------------------------------------------------


def test_stop_resets_all_clients_and_leaves_nothing_open(net, backend):
    with Proxy([port_of(backend)]) as proxy:
        client, server = net.pair(proxy, backend)
        proxy.delay(HOURS)
        client.sendall(b"held")
        proxy.hang()
        hanging = net.dial(proxy)
        until(lambda: proxy.accepted == 2)
    proxy.stop()
    assert all(is_reset(sock) for sock in (client, server, hanging))
    with pytest.raises(ConnectionRefusedError):
        net.dial(proxy)
    assert proxy.open == 0
    assert not proxy._thread.is_alive()
    assert proxy.loop.is_closed()
    # A forgotten socket or task would warn, and a warning is an error.
    gc.collect()


def test_stop_does_not_wait_for_a_backend_that_does_not_accept(net):
    proxy = net.proxy(full := net.backend(backlog=0))
    # On Linux one more connection fits into the full queue.
    clients = [net.dial(proxy) for _ in range(3)]
    until(lambda: proxy.open == 3)
    assert proxy.open_by_backend()[port_of(full)] < 3
    proxy.stop()
    assert all(is_reset(client) for client in clients)
    assert proxy.open == 0
    gc.collect()


# -- gRPC, and replicas -------------------------------------------------------------


@pytest.fixture
def replicas():
    with Replicas(3, policies={"app.x": True}) as replicas:
        yield replicas


def stub_for(net, options, *more):
    channel = grpc.insecure_channel(options.url, [*CHANNEL, *more])
    return AuthorizerStub(net.made.enter_context(channel))


def allows(stub):
    answer = stub.Is(REQUEST, timeout=10)
    return [getattr(decision, "is") for decision in answer.decisions] == [True]


def is_answered(stub):
    try:
        return bool(stub.Is(REQUEST, timeout=10))
    except grpc.RpcError:
        return False


def code_of_the_first_failure(stub, timeout=10.0):
    while True:
        try:
            stub.Is(REQUEST, timeout=timeout)
        except grpc.RpcError as error:
            return error.code().name


def test_channels_behind_one_address_reach_all_replicas(net, replicas):
    assert replicas.serving() == set()
    for _ in range(3):
        assert allows(stub_for(net, replicas.options))
    assert replicas.serving() == {0, 1, 2}
    assert all(replicas.calls(index) == {"Is": 1} for index in range(3))
    assert replicas.proxy.accepted == 3


def test_the_replicas_share_their_policies(net, replicas):
    replicas[0].policies["app.x"] = False
    assert not any(allows(stub_for(net, replicas.options)) for _ in range(3))


def test_a_channel_with_all_addresses_reaches_replicas_without_the_proxy(net, replicas):
    stub = stub_for(
        net, replicas.addressed_options, ("grpc.lb_policy_name", "round_robin")
    )
    until(lambda: allows(stub) and replicas.serving() == {0, 1, 2})
    assert replicas.proxy.accepted == 0
    ports = [replicas[index].port for index in range(3)]
    assert replicas.target == "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)


@pytest.mark.parametrize("grace", [0.0, 5.0])
def test_a_restarted_replica_serves_on_the_same_port(net, replicas, grace):
    port = replicas[1].port
    for _ in range(3):
        assert allows(stub_for(net, replicas.options))
    replicas.restart(1, grace=grace)
    assert replicas[1].port == port
    assert 1 not in replicas.serving()
    for _ in range(3):
        assert allows(stub_for(net, replicas.options))
    assert replicas.calls(1) == {"Is": 2}


def test_calls_to_a_half_open_replica_time_out_until_it_is_cut(net, replicas):
    stub = stub_for(net, replicas.options)
    assert stub.Info(InfoRequest(), timeout=10)
    replicas.proxy.half_open(replicas[0].port)
    assert code_of_the_first_failure(stub, timeout=0.1) == "DEADLINE_EXCEEDED"
    assert replicas.proxy.cut() == 1
    # gRPC sends calls to a dead connection until it has noticed.
    until(lambda: is_answered(stub))
    assert replicas.calls(1) == {"Is": 1}
    assert replicas.calls(0) == {"Info": 1}


@pytest.mark.parametrize("fault", ["reset_mid_response", "truncate_mid_response"])
def test_a_truncated_response_fails_a_call_that_the_server_executed(
    net, replicas, fault
):
    stub = stub_for(net, replicas.options)
    assert stub.Info(InfoRequest(), timeout=10)
    getattr(replicas.proxy, fault)(50)
    assert code_of_the_first_failure(stub) == "UNAVAILABLE"
    assert replicas.calls(0)["Is"] >= 1
    replicas.proxy.heal()
    until(lambda: is_answered(stub))


async def test_a_pool_opens_its_connections_to_all_replicas(replicas):
    # However slow the machine is, no timeout opens or closes another connection.
    pool = ConnectionPool(
        min_connections=3,
        eager_init=True,
        connection_timeout=50,
        health_check_interval=HOURS,
    )
    pool.configure(replicas.options)
    async with pool:
        assert replicas.serving() == {0, 1, 2}
        assert replicas.proxy.accepted == 3
        assert await anyio.to_thread.run_sync(replicas.proxy.cut) == 3
