"""A network of proxies."""

from __future__ import annotations

import pytest

from kit.network_of_proxies import Net


@pytest.fixture
def net():
    net = Net()
    with net.made:
        yield net


@pytest.fixture
def backend(net):
    return net.backend()


@pytest.fixture
def proxy(net, backend):
    return net.proxy(backend)
