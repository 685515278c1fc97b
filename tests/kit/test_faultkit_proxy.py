"""The proxy of the fault kit, with both ends of each connection under test control."""

from __future__ import annotations

import os
import socket
import struct
import time

import pytest

from kit.network_of_proxies import HOURS, is_reset, port_of
from kit.waiting import until


pytestmark = pytest.mark.real_clock

RESET = struct.pack("ii", 1, 0)


def read(sock, size):
    data = b""
    while len(data) < size:
        chunk = sock.recv(size - len(data))
        assert chunk, f"it ended after {data!r}"
        data += chunk
    return data


def passes(sender, receiver, data=b"hello"):
    sender.sendall(data)
    return read(receiver, len(data)) == data


def is_silent(*socks):
    """Return whether nothing arrives, for as long as a test can wait."""
    for sock in socks:
        sock.settimeout(0.03)
        try:
            sock.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            continue
        finally:
            sock.settimeout(10)
        return False
    return True


def sent_until_full(sock, block, limit):
    """Return the number of complete blocks that were accepted."""
    sock.settimeout(0.3)
    for count in range(limit):
        try:
            sock.sendall(block)
        except TimeoutError:
            return count
    return limit


def hang_up(sock, *, reset=False):
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


# -- forwarding


def test_bytes_pass_in_both_directions(net, proxy, backend):
    client, server = net.pair(proxy, backend)
    assert passes(client, server)
    assert passes(server, client)
    assert proxy.url == f"127.0.0.1:{proxy.port}"
    assert (proxy.accepted, proxy.open) == (1, 1)
    assert proxy.open_by_backend() == {port_of(backend): 1}


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_closing_one_end_closes_the_other_end(net, proxy, backend, first, reset):
    ends = net.pair(proxy, backend)
    leaver, left = ends[first], ends[1 - first]
    leaver.sendall(b"bye")
    assert read(left, 3) == b"bye"
    hang_up(leaver, reset=reset)
    assert is_reset(left) == reset
    until(lambda: proxy.open == 0)
    assert proxy.open_by_backend() == {}
    assert proxy.accepted == 1


def test_bytes_sent_before_the_backend_is_connected_still_arrive(net, proxy, backend):
    client = net.dial(proxy)
    client.sendall(b"hello and bye")
    client.close()
    server = net.accept(backend)
    assert read(server, 13) == b"hello and bye"
    assert server.recv(1) == b""


def test_a_fast_sender_is_slowed_down_and_no_byte_is_lost(net, proxy, backend):
    client, server = net.pair(proxy, backend)
    block = os.urandom(1024 * 1024)
    blocks = sent_until_full(client, block, limit=100)
    assert 1 < blocks < 100
    assert all(read(server, len(block)) == block for _ in range(blocks))


def test_connections_go_to_the_backends_round_robin(net):
    backends = [net.backend() for _ in range(3)]
    proxy = net.proxy(*backends)
    for backend in backends * 2:
        assert passes(*net.pair(proxy, backend))
    assert proxy.open_by_backend() == {port_of(backend): 2 for backend in backends}


def test_a_backend_that_refuses_is_skipped(net):
    backends = [net.backend() for _ in range(3)]
    proxy = net.proxy(*backends)
    backends[1].close()
    for index in (0, 2, 2, 0):
        assert passes(*net.pair(proxy, backends[index]))


def test_a_client_is_reset_if_all_backends_refuse(net, proxy, backend):
    backend.close()
    # It may be so fast that connect() already raises.
    with pytest.raises(ConnectionResetError):
        net.dial(proxy).recv(1)
    proxy.backends = []
    with pytest.raises(ConnectionResetError):
        net.dial(proxy).recv(1)
    until(lambda: proxy.open == 0)
    assert proxy.accepted == 2


def test_backends_can_be_replaced_and_connections_to_the_old_ones_stay(
    net, proxy, backend
):
    old = net.pair(proxy, backend)
    other = net.backend()
    proxy.backends = [port_of(other)]
    assert passes(*net.pair(proxy, other))
    assert passes(*old)


def test_the_time_of_each_accept_is_recorded(net, proxy):
    before = time.monotonic()
    for count in range(1, 4):
        net.dial(proxy)
        until(lambda count=count: proxy.accepted == count)
    times = [before, *proxy.accepted_at, time.monotonic()]
    assert times == sorted(times)
    assert len(times) == 5


# -- refuse and listen


def test_refuse_rejects_clients_until_listen_reopens_the_same_port(net, proxy, backend):
    port = proxy.port
    old = net.pair(proxy, backend)
    for _ in range(2):
        proxy.refuse()
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            net.dial(proxy)
        assert passes(*old)
        proxy.heal()
        with pytest.raises(ConnectionRefusedError):
            net.dial(proxy)
        proxy.listen()
        proxy.listen()
        assert passes(*net.pair(proxy, backend))
        assert passes(*old)
    assert proxy.port == port


def test_a_client_connected_before_refuse_stays_connected(net, proxy, backend):
    for _ in range(20):
        client = net.dial(proxy)
        proxy.refuse()
        assert passes(client, net.accept(backend))
        proxy.listen()


# -- hang


def test_a_hanging_proxy_accepts_and_stays_silent_until_it_is_healed(
    net, proxy, backend
):
    old = net.pair(proxy, backend)
    proxy.hang()
    client = net.dial(proxy)
    client.sendall(b"anybody there?")
    assert is_silent(client)
    until(lambda: proxy.open == 2)
    assert proxy.open_by_backend() == {port_of(backend): 1}
    assert passes(*old)
    proxy.heal()
    server = net.accept(backend)
    assert read(server, 14) == b"anybody there?"
    assert passes(server, client)


def test_a_client_connected_before_hang_does_not_hang(net, proxy, backend):
    for _ in range(20):
        client = net.dial(proxy)
        proxy.hang()
        assert passes(client, net.accept(backend))
        proxy.heal()


def test_the_proxy_notices_a_client_that_disconnects_during_a_hang(net, proxy):
    proxy.hang()
    client = net.dial(proxy)
    client.sendall(b"anybody there?")
    until(lambda: proxy.open == 1)
    client.close()
    until(lambda: proxy.open == 0)
    # The backend does not get these bytes after heal either.
    until(lambda: not proxy.links)


# -- half_open


def test_a_half_open_connection_loses_all_bytes_and_is_reset_when_healed(
    net, proxy, backend
):
    client, server = net.pair(proxy, backend)
    proxy.half_open()
    new_client, new_server = net.pair(proxy, backend)
    for sock in (client, server, new_client, new_server):
        sock.sendall(b"lost")
    assert is_silent(client, server, new_client, new_server)
    assert proxy.open == 2
    proxy.heal()
    for sock in (client, server, new_client, new_server):
        assert is_reset(sock)
    assert proxy.open == 0
    assert passes(*net.pair(proxy, backend))


@pytest.mark.parametrize("first", [0, 1])
def test_a_half_open_connection_hides_a_close_of_the_other_end(
    net, proxy, backend, first
):
    ends = net.pair(proxy, backend)
    proxy.half_open()
    ends[first].close()
    assert is_silent(ends[1 - first])
    proxy.heal()
    assert is_reset(ends[1 - first])
    assert proxy.open == 0


def test_only_connections_to_the_given_backend_are_half_open(net):
    backends = net.backend(), net.backend()
    proxy = net.proxy(*backends)
    bad, good = (net.pair(proxy, backend) for backend in backends)
    proxy.half_open(port_of(backends[0]))
    bad[0].sendall(b"lost")
    assert passes(*good)
    assert is_silent(bad[1])
    bad, good_too = (net.pair(proxy, backend) for backend in backends)
    bad[1].sendall(b"lost")
    assert passes(*good_too)
    assert is_silent(bad[0])
    proxy.heal()
    assert is_reset(bad[0])
    assert passes(*good)


def test_a_half_open_connection_that_lost_no_bytes_survives_heal(net, proxy, backend):
    client, server = net.pair(proxy, backend)
    assert passes(client, server)
    proxy.half_open()
    proxy.heal()
    assert passes(client, server)
    assert passes(server, client)


# -- freeze


def test_a_frozen_connection_delivers_once_it_is_healed(net, proxy, backend):
    client, server = net.pair(proxy, backend)
    proxy.freeze()
    client.sendall(b"a question")
    server.sendall(b"an answer")
    assert is_silent(client, server)
    proxy.heal()
    assert read(server, 10) == b"a question"
    assert read(client, 9) == b"an answer"
    assert passes(client, server)
    assert proxy.accepted == proxy.open == 1


def test_freeze_applies_to_new_connections_of_the_given_backend_only(net):
    backends = net.backend(), net.backend()
    proxy = net.proxy(*backends)
    proxy.freeze(port_of(backends[0]))
    (client, server), good = (net.pair(proxy, backend) for backend in backends)
    client.sendall(b"a question")
    assert passes(*good)
    assert is_silent(server)
    proxy.heal()
    assert read(server, 10) == b"a question"


def test_a_frozen_backend_sees_at_heal_that_its_client_disconnected(
    net, proxy, backend
):
    client, server = net.pair(proxy, backend)
    proxy.freeze()
    client.sendall(b"bye")
    client.close()
    until(lambda: proxy.open == 0)
    assert is_silent(server)
    assert proxy.cut() == 0
    proxy.heal()
    assert read(server, 3) == b"bye"
    assert server.recv(1) == b""


# -- reset_mid_response and truncate_mid_response


def test_a_response_is_reset_after_the_given_number_of_bytes(net, proxy, backend):
    old = net.pair(proxy, backend)
    assert passes(old[1], old[0], b"before")
    proxy.reset_mid_response(7)
    for client, server in (old, net.pair(proxy, backend)):
        assert passes(client, server, b"a long question")
        server.sendall(b"half")
        assert read(client, 4) == b"half"
        server.sendall(b" an answer")
        assert read(client, 3) == b" an"
        assert is_reset(client)
        assert is_reset(server)
    assert proxy.open == 0
    proxy.heal()
    client, server = net.pair(proxy, backend)
    assert passes(server, client, b"a whole answer")


def test_a_response_can_be_reset_before_its_first_byte(net, proxy, backend):
    client, server = net.pair(proxy, backend)
    proxy.reset_mid_response(0)
    assert passes(client, server)
    server.sendall(b"an answer")
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_a_truncated_response_ends_with_fin_even_if_the_client_keeps_sending(
    net, proxy, backend
):
    old = net.pair(proxy, backend)
    proxy.truncate_mid_response(7)
    for client, server in (old, net.pair(proxy, backend)):
        server.sendall(b"half an answer")
        assert read(client, 7) == b"half an"
        assert is_reset(server)
        client.sendall(bytes(40 * 1024 * 1024))
        assert client.recv(1) == b""
        client.close()
    until(lambda: proxy.open == 0)


def test_a_truncated_response_ends_with_fin_even_if_the_server_has_closed(
    net, proxy, backend
):
    client, server = net.pair(proxy, backend)
    proxy.truncate_mid_response(7)
    proxy.delay(0.02)
    server.sendall(b"half an answer")
    server.close()
    assert read(client, 7) == b"half an"
    for _ in range(3):
        client.sendall(b"what?")
        assert client.recv(1) == b""


def test_responses_are_complete_again_after_heal(net, proxy, backend):
    client, server = net.pair(proxy, backend)
    proxy.truncate_mid_response(7)
    assert passes(server, client, b"half")
    proxy.heal()
    assert passes(server, client, b"an answer")


# -- delay and slow_handshake


def test_delayed_chunks_arrive_in_order_and_the_end_comes_last(net, proxy, backend):
    client, server = net.pair(proxy, backend)
    # Shorter and shorter, so that each could overtake the one before.
    proxy.delay(0.1)
    server.sendall(b"1")
    client.sendall(b"question")
    proxy.delay(0.05)
    server.sendall(b"2")
    proxy.delay(0)
    server.sendall(b"3")
    assert read(server, 8) == b"question"
    server.close()
    assert read(client, 3) == b"123"
    assert client.recv(1) == b""


def test_delayed_bytes_are_sent_at_once_on_heal(net, proxy, backend):
    client, server = net.pair(proxy, backend)
    proxy.delay(HOURS)
    client.sendall(b"a question")
    server.sendall(b"an answer")
    assert is_silent(client, server)
    proxy.heal()
    assert read(server, 10) == b"a question"
    assert read(client, 9) == b"an answer"
    assert passes(client, server)


def test_a_slow_handshake_delays_only_new_connections(net, proxy, backend):
    old = net.pair(proxy, backend)
    proxy.slow_handshake(HOURS)
    client, server = net.pair(proxy, backend)
    client.sendall(b"a question")
    server.sendall(b"an answer")
    assert passes(*old)
    assert is_silent(client, server)
    proxy.heal()
    assert read(server, 10) == b"a question"
    assert read(client, 9) == b"an answer"
    assert passes(client, server)


def test_a_slow_handshake_ends_by_itself(net, proxy, backend):
    proxy.slow_handshake(0.05)
    client, server = net.pair(proxy, backend)
    assert passes(client, server)
    assert passes(server, client)


# -- cut


def test_the_oldest_connections_are_cut_first(net, proxy, backend):
    pairs = [net.pair(proxy, backend) for _ in range(4)]
    assert proxy.cut(0) == 0
    assert proxy.cut(2) == 2
    assert proxy.open == 2
    assert all(is_reset(end) for pair in pairs[:2] for end in pair)
    assert all(passes(*pair) for pair in pairs[2:])
    assert proxy.cut() == 2
    assert proxy.cut() == proxy.open == 0
    assert passes(*net.pair(proxy, backend))


def test_only_connections_to_the_given_backend_are_cut(net):
    backends = net.backend(), net.backend()
    proxy = net.proxy(*backends)
    pairs = [net.pair(proxy, backend) for backend in backends * 2]
    assert proxy.cut(1, backend=port_of(backends[1])) == 1
    assert is_reset(pairs[1][0])
    assert proxy.cut(backend=port_of(backends[1])) == 1
    assert is_reset(pairs[3][0])
    assert all(passes(*pair) for pair in pairs[::2])


def test_clients_that_just_connected_or_hang_are_cut_too(net, proxy):
    for _ in range(20):
        client = net.dial(proxy)
        assert proxy.cut() == 1
        assert is_reset(client)
    proxy.hang()
    client = net.dial(proxy)
    assert proxy.cut() == 1
    assert is_reset(client)
