"""Fixtures of servers that tests in several folders use."""

from __future__ import annotations

import logging

import pytest

from fastapi_topaz.testing import EmbeddedAuthorizer

from .bus import FakeBus
from .faultkit.frames import FrameServer, answer
from .faultkit.http2 import Http2Server
from .programs import Programs
from .secrets import KEY


@pytest.fixture
def no_log(caplog):
    """Write no log, because a model produces very many lines."""
    caplog.set_level(logging.CRITICAL + 1, logger="fastapi_topaz")


@pytest.fixture
def frame_server():
    """A server that writes single frames; by default it allows each check."""
    with FrameServer(answer()) as running:
        yield running


@pytest.fixture
def http2_server():
    """A scripted server with clients that must keep to the protocol."""
    with Http2Server() as running:
        yield running
        assert running.errors == []


@pytest.fixture
def lenient_http2_server():
    """A scripted server that may itself break the protocol."""
    with Http2Server() as running:
        yield running


@pytest.fixture
def keyed_authorizer():
    """An authorizer that requires the API key, which is a secret."""
    with EmbeddedAuthorizer(lambda _check: True, api_key=KEY) as running:
        yield running


@pytest.fixture(params=["native", "grpcio"])
def transport(request):
    """Each transport."""
    return request.param


@pytest.fixture(scope="session")
def run_program(tmp_path_factory):
    """Run a program in a process of its own; see `Programs`."""
    with Programs(tmp_path_factory.mktemp("programs")) as programs:
        yield programs.run


@pytest.fixture
def hub():
    """An invalidation bus in this process."""
    return FakeBus()
