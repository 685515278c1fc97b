"""Backends, virtual time and ports for all tests."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import importlib.util
import itertools
import logging
import os
import random
import signal
import socket
import sys
import tempfile
import zlib
from functools import partial
from pathlib import Path

import hypothesis
import pytest
import trio.testing

from fastapi_topaz.connector import TRANSPORT_VARIABLE


sys.path.insert(0, str(Path(__file__).parent))

pytest.register_assert_rewrite("kit")

from kit.autojump import AutojumpLoop  # noqa: E402
from kit.shuffled import shuffled_loop  # noqa: E402


# Even if Python is told to write no bytecode. Otherwise each of the many programs that
# tests start would compile the whole package.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A process that a shell starts in the background ignores Ctrl-C. Programs that tests
# start and stop with Ctrl-C would inherit this.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["fastapi_topaz.testing.fixtures", "kit.fixtures"]

# By default the same examples each time. The time of one example depends on how busy
# the machine is.
hypothesis.settings.register_profile(
    "unhurried",
    parent=hypothesis.settings(),
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=50,  # `nox -s model` tries other examples, and many more
)
hypothesis.settings.load_profile("unhurried")
hypothesis.settings.register_profile(
    "deep",
    parent=hypothesis.settings.get_profile("unhurried"),
    derandomize=False,
    max_examples=2000,  # the models run a hundredth of this times their own number
    print_blob=True,
)

# Tests that run on a shuffled loop by default: tests of the pool's own tasks.
SHUFFLED = {
    "test_cancel_everywhere",
    "test_foreign_code",
    "test_pool_acquire",
    "test_pool_lifecycle",
    "test_pool_reopening",
}


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """
    Hide all objects that exist after the collection from the garbage collector.

    These are about half a million. Otherwise each full collection would take a
    fifth of a second, and a forked child would copy the memory of all of them.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_itemcollected(item):
    # xdist needs the same ids in all of its processes.
    if " at 0x" in item.nodeid:
        raise pytest.UsageError(f"this id has an address in it: {item.nodeid}")


def pytest_addoption(parser):
    parser.addoption(
        "--shuffle",
        type=int,
        metavar="N",
        help="run all tests in virtual time on N asyncio loops that shuffle ready "
        "tasks, by seeds from SHUFFLE_SEED on; default: one, for the pool's own tests",
    )


def pytest_configure(config):
    # By default the same seed each time. It is in the environment, where the workers of
    # pytest-xdist find it.
    chosen = config.getoption("--shuffle") is not None
    seed = random.SystemRandom().randrange(10**6) if chosen else 1
    os.environ.setdefault("SHUFFLE_SEED", str(seed))


def pytest_report_header():
    return f"shuffled loops: SHUFFLE_SEED={os.environ['SHUFFLE_SEED']}"


def shuffled_names(metafunc):
    """Return the shuffled backends. Their seeds are in the ids of the tests."""
    count = metafunc.config.getoption("--shuffle")
    if count is None:
        count = int(metafunc.module.__name__.rpartition(".")[2] in SHUFFLED)
    first = int(os.environ["SHUFFLE_SEED"])
    return [f"asyncio+shuffled-{first + step}" for step in range(count)]


def pytest_generate_tests(metafunc):
    """
    Run each async test on asyncio and trio.

    Tests run in virtual time, unless they are marked `real_clock`. While only a socket
    or a thread works, a virtual clock sees an idle loop and jumps ahead.
    """
    if "anyio_backend" not in metafunc.fixturenames:
        return
    marks = metafunc.definition.iter_markers("parametrize")
    if any("anyio_backend" in mark.args[0] for mark in marks):
        return  # the test names its own backend
    names = ["asyncio", "trio"]
    if metafunc.definition.get_closest_marker("real_clock"):
        # Where the loop could make a difference: in the transport itself.
        marked = metafunc.definition.get_closest_marker("uvloop")
        if marked and importlib.util.find_spec("uvloop"):
            names.append("asyncio+uvloop")
    else:
        names += ["asyncio+eager"] * (sys.version_info >= (3, 12))
        names += shuffled_names(metafunc)
    metafunc.parametrize("anyio_backend", names, indirect=True)


@pytest.hookimpl(tryfirst=True)  # pytest deselects slow tests in the same hook
def pytest_collection_modifyitems(config, items):
    """
    Mark what costly tests leave to the slow ones, and deselect `grpcio` on trio.

    `grpcio` works on asyncio only.
    """
    for item in items:
        if item.get_closest_marker("costly") and is_for_slow_tests(item):
            item.add_marker(pytest.mark.slow)
    on_trio = [item for item in items if over_grpcio(item) and "trio" in backends(item)]
    if on_trio:
        config.hook.pytest_deselected(items=on_trio)
        items[:] = [item for item in items if item not in set(on_trio)]


def is_for_slow_tests(item):
    """
    Return whether a costly test leaves its backend to the slow tests.

    By default, half of the costly tests of sockets run on trio, and the others on
    asyncio. In virtual time all run on asyncio, as the mutants do. Over `grpcio`, where
    the slow tests do not run, all backends run.
    """
    if over_grpcio(item):
        return False
    is_even = zlib.crc32(item.originalname.encode()) % 2 == 0
    is_real = item.get_closest_marker("real_clock") is not None
    chosen = "trio" if is_even and is_real else "asyncio"
    others = [name for name in backends(item) if "shuffled" not in name]
    return others != [] and chosen not in others


def over_grpcio(item):
    """Return whether a test uses the transport `grpcio`."""
    if item.get_closest_marker("grpcio"):
        return True
    chosen = parameters(item).get("transport", os.environ.get(TRANSPORT_VARIABLE))
    return chosen == "grpcio" and not item.get_closest_marker("native")


def backends(item):
    """Return the names of the backends of a test."""
    named = (parameters(item).get(name) for name in ("anyio_backend", "backend"))
    return [name for name in named if name]


def parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


# Without `monkeypatch`: each fixture takes a tenth of a millisecond of each test, and
# there are thousands.
@pytest.fixture(autouse=True)
def _transport_of_markers(request):
    """Use the transport of the marker `grpcio` or `native`, if there is one."""
    with pytest.MonkeyPatch.context() as patch:
        for transport in ("grpcio", "native"):
            if request.node.get_closest_marker(transport):
                patch.setenv(TRANSPORT_VARIABLE, transport)
        yield


@pytest.fixture
def anyio_backend(request):
    name = request.param
    real = request.node.get_closest_marker("real_clock") is not None
    if name == "trio":
        clock = None if real else trio.testing.MockClock(autojump_threshold=0)
        return "trio", {"clock": clock}
    if name == "asyncio+uvloop":
        return "asyncio", {"use_uvloop": True}
    if name.startswith("asyncio+shuffled-"):
        seed = int(name.rpartition("-")[2])
        return "asyncio", {"loop_factory": partial(shuffled_loop, seed)}
    if name == "asyncio+eager":
        return "asyncio", {"loop_factory": eager_loop}
    return "asyncio", {} if real else {"loop_factory": AutojumpLoop}


def eager_loop():
    loop = AutojumpLoop()
    loop.set_task_factory(asyncio.eager_task_factory)
    return loop


@contextlib.contextmanager
def _block_of_ports():
    """Yield ports, without end, that no other process with these tests uses."""
    # Below the ports that the system assigns.
    blocks = [range(first, first + 500) for first in range(12_000, 32_000, 500)]
    for block in blocks:
        path = Path(tempfile.gettempdir(), f"fastapi_topaz-ports-{block.start}")
        try:
            lock = path.open("w")
        except OSError:  # a port of another user
            continue
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # in use
                continue
            yield itertools.cycle(block)
            return
    raise RuntimeError(f"{len(blocks)} processes run these tests already")


@pytest.fixture(autouse=True, scope="session")
def _ports_of_ones_own():
    """
    Let no other process get the port of a server that is stopped and started again.

    A process that asks the system for any free port might get it, and other tests do so
    at the same time. So servers use ports that the system does not assign, and each
    process has a different range.
    """
    create_server = socket.create_server

    def create(address, **options):
        host, port, *rest = address
        if port:
            return create_server(address, **options)
        for candidate in itertools.islice(ports, 500):
            try:
                return create_server((host, candidate, *rest), **options)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
        return create_server(address, **options)

    with _block_of_ports() as ports, pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "create_server", create)
        yield


@pytest.fixture(autouse=True, scope="module")
def _no_garbage():
    """Make a socket that a test file left open warn there, not in the next file."""
    yield
    gc.collect()


@pytest.fixture(autouse=True, scope="session")
def _all_lines():
    """Let `caplog` get lines of each level."""
    logging.getLogger("fastapi_topaz").setLevel(logging.DEBUG)


@pytest.fixture
def host_survives(caplog):
    """Fail if the host task failed: the pool reopens, which can look like success."""
    yield
    records = caplog.get_records("call")
    assert not [r for r in records if r.levelno >= logging.CRITICAL]
