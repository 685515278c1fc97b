"""Test the peer of a connection, read from channelz."""

from __future__ import annotations

import pytest
from grpc._cython import cygrpc

from kit.channels import connected


# Far longer than a test takes.
PATIENCE = 20.0


def unreadable(_number):
    raise RuntimeError("no book")


BOOKS = [
    "channelz_get_top_channels",
    "channelz_get_channel",
    "channelz_get_subchannel",
]


@pytest.mark.real_clock
@pytest.mark.parametrize("book", BOOKS)
async def test_a_connection_works_if_its_peer_cannot_be_read(
    book, monkeypatch, embedded_authorizer
):
    monkeypatch.setattr(cygrpc, book, unreadable)
    async with connected(embedded_authorizer.options) as connection:
        assert connection.peer is None
        connection.refresh_liveness()
        assert not connection.is_lost()
        await connection.probe(PATIENCE)


@pytest.mark.real_clock
async def test_an_address_without_a_socket_gives_no_peer(
    monkeypatch, embedded_authorizer
):
    # As for a server that was tried and did not answer.
    monkeypatch.setattr(
        cygrpc, "channelz_get_subchannel", lambda _: b'{"subchannel": {}}'
    )
    async with connected(embedded_authorizer.options) as connection:
        assert connection.peer is None


@pytest.mark.real_clock
async def test_an_unreadable_socket_is_not_treated_as_lost(
    monkeypatch, embedded_authorizer
):
    async with connected(embedded_authorizer.options) as connection:
        assert connection.peer is not None
        monkeypatch.setattr(cygrpc, "channelz_get_socket", unreadable)
        connection.refresh_liveness()
        assert not connection.is_lost()
        await connection.probe(PATIENCE)
