"""
Adapters for other connection pools, so that benchmarks use all pools in the same way.

The connections do nothing, so a benchmark measures only the pool. Each pool is used as
its documentation says, with its own default timeout for a lease. If a pool has no
default timeout, it gets 5 seconds, because real applications limit the wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import importlib.util
import io
import subprocess
import sys
import tarfile
import types
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from fastapi_topaz import ConnectionPool
from fastapi_topaz.testing import FakeConnector


if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager


BACKENDS = ("asyncio", "uvloop", "trio")
OURS = "ours"
PREDECESSOR = "fastapi-topaz 1.1.0"
SUCCESSOR = "fastapi-topaz 2.0.0"

CACHE = Path(__file__).parent / ".peers"

TIMEOUT = 5.0
"""Time limit in seconds for a lease, if the pool has no default."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """
    One pool to measure.

    Attributes:
        name: The name with the version.
        open: A function that takes the number of connections. It returns a context
            manager, which makes all connections and yields a function `lease`. To
            take one lease, enter the result of `lease()`.
        backends: The backends of `BACKENDS` on which the pool runs.
    """

    name: str
    open: Callable[[int], AbstractAsyncContextManager[Callable[[], Any]]]
    backends: tuple[str, ...] = ("asyncio", "uvloop")


def run(backend, function, *arguments):
    """Run an async function on *backend* and return its result."""
    if backend == "uvloop":
        options = {"use_uvloop": True}
        return anyio.run(function, *arguments, backend_options=options)
    return anyio.run(function, *arguments, backend=backend)


def fill(lease, count):
    """Return a context manager that holds *count* leases at once."""

    @contextlib.asynccontextmanager
    async def held():
        async with contextlib.AsyncExitStack() as leases:
            for _ in range(count):
                await leases.enter_async_context(lease())
            yield

    return held()


# -- pools ------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def open_ours(count, **options):
    """Open a pool of this package with *options* and yield it."""
    async with ConnectionPool(
        connector=FakeConnector(),
        min_connections=count,
        max_connections=count,
        eager_init=True,
        **options,
    ) as pool:
        yield pool


def ours(**options):
    @contextlib.asynccontextmanager
    async def opened(count):
        async with open_ours(count, **options) as pool:
            yield pool.acquire  # waits 5 s

    return Peer(OURS, opened, BACKENDS)


def predecessor():
    """Return the pool of the other package `fastapi-topaz`. Only its pool is loaded."""
    module = _predecessor_module()

    @contextlib.asynccontextmanager
    async def opened(count):
        pool = module.ConnectionPool(min_connections=count, max_connections=count)

        async def create():
            conn = module.PooledConnection(client=object())
            pool._connections.add(conn)
            return conn

        pool._create_connection = create
        await pool.initialize()
        async with fill(pool.connection, count):
            pass
        try:
            yield pool.connection  # waits 5 s
        finally:
            await pool.close()

    return Peer(PREDECESSOR, opened)


def extracted(commit, folder):
    """Write the package as of *commit* into *folder*; return whether git has it."""
    archive = subprocess.run(
        ["git", "-C", Path(__file__).parent.parent, "archive", commit, "fastapi_topaz"],
        capture_output=True,
        check=False,
    )
    if archive.returncode:
        print(archive.stderr.decode(), file=sys.stderr)
        return False
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    return True


def _predecessor_module():
    return _module_of(PREDECESSOR, "connection_pool.py")


def shared_client(options):
    """Return the client of fastapi-topaz 2.0.0, which keeps one channel."""
    import aserto.client  # noqa: PLC0415

    return _module_of(SUCCESSOR, "_client.py").SharedAuthorizerClient(
        aserto.client.AuthorizerOptions(
            url=options.url, cert_file_path=options.cert_file_path
        ),
        insecure=options.insecure,
    )


def unpacked(release):
    """Return the folder that has the package of another release of `fastapi-topaz`."""
    folder = CACHE / f"{release.replace(' ', '-')}-whole"
    if not folder.exists():
        with zipfile.ZipFile(_wheel(release)) as wheel:
            wheel.extractall(folder)
    return folder


def _wheel(release):
    """Return the wheel of a release of `fastapi-topaz`, which pip downloads once."""
    name, number = release.split()
    pattern = f"fastapi_topaz-{number}-*.whl"
    if not list(CACHE.glob(pattern)):
        # Downloaded but not installed, because it would replace this package.
        pip = "-m pip download -q --no-deps --disable-pip-version-check"
        subprocess.run(
            [sys.executable, *pip.split(), "--dest", CACHE, f"{name}=={number}"],
            check=False,  # success means that the wheel exists
        )
    wheels = list(CACHE.glob(pattern))
    if not wheels:
        raise ImportError(f"pip could not download {name}=={number}")
    return wheels[0]


@functools.cache
def _module_of(release, file):
    """Load one module of another release of `fastapi-topaz`, and no other part."""
    name, number = release.split()
    source = CACHE / f"{name}-{number}" / file
    if not source.exists():
        archive = _wheel(release)
        source.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(archive) as wheel:
            source.write_bytes(wheel.read(f"fastapi_topaz/{file}"))
    module_name = f"{name}_{number}_{source.stem}"
    spec = importlib.util.spec_from_file_location(module_name, source)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look up names there
    spec.loader.exec_module(module)
    return module


def generic_connection_pool():
    from generic_connection_pool.asyncio import (  # noqa: PLC0415
        BaseConnectionManager,
        ConnectionPool,
    )

    class Manager(BaseConnectionManager):
        async def create(self, endpoint):  # noqa: ARG002
            return object()

        async def dispose(self, endpoint, conn):
            pass

    @contextlib.asynccontextmanager
    async def opened(count):
        pool = ConnectionPool(
            Manager(),
            min_idle=count,
            max_size=count,
            acquire_timeout=TIMEOUT,  # it has no default
            background_collector=True,  # as in its README
        )
        lease = functools.partial(pool.connection, "endpoint")
        async with fill(lease, count):
            pass
        try:
            yield lease
        finally:
            # Without a limit, close() never ends if a connection is lost.
            with contextlib.suppress(asyncio.TimeoutError):
                await pool.close(timeout=1)

    return Peer(_named("generic-connection-pool"), opened)


def aiosqlitepool():
    from aiosqlitepool import SQLiteConnectionPool  # noqa: PLC0415

    class Connection:
        async def execute(self, *args, **kwargs):
            pass

        async def rollback(self):
            pass

        async def close(self):
            pass

    async def connect():
        return Connection()

    @contextlib.asynccontextmanager
    async def opened(count):
        async with SQLiteConnectionPool(connect, pool_size=count) as pool:
            async with fill(pool.connection, count):
                pass
            yield pool.connection  # waits 30 s

    return Peer(_named("aiosqlitepool"), opened)


class _DBAPIConnection:
    """A fake connection with the methods that SQLAlchemy's pools call."""

    def rollback(self):
        pass

    def close(self):
        pass


def sqlalchemy_async():
    """Return the pool of `AsyncEngine`, run in greenlets as `AsyncEngine` does."""
    from sqlalchemy.pool import AsyncAdaptedQueuePool  # noqa: PLC0415
    from sqlalchemy.util import greenlet_spawn  # noqa: PLC0415

    class Claim:
        __slots__ = ("conn", "pool")

        def __init__(self, pool):
            self.pool = pool

        async def __aenter__(self):
            self.conn = await greenlet_spawn(self.pool.connect)
            return self.conn

        async def __aexit__(self, *_):
            await greenlet_spawn(self.conn.close)

    @contextlib.asynccontextmanager
    async def opened(count):
        pool = AsyncAdaptedQueuePool(_DBAPIConnection, pool_size=count, max_overflow=0)
        lease = functools.partial(Claim, pool)
        async with fill(lease, count):
            pass
        yield lease  # waits 30 s
        await greenlet_spawn(pool.dispose)

    return Peer(f"{_named('SQLAlchemy')} AsyncAdaptedQueuePool", opened)


def sqlalchemy_sync(count):
    """Return SQLAlchemy's pool for threads, with all connections made. Not a `Peer`."""
    from sqlalchemy.pool import QueuePool  # noqa: PLC0415

    pool = QueuePool(_DBAPIConnection, pool_size=count, max_overflow=0)
    for conn in [pool.connect() for _ in range(count)]:
        conn.close()
    return pool


def psycopg_pool():
    from psycopg.pq import TransactionStatus  # noqa: PLC0415
    from psycopg_pool import AsyncConnectionPool  # noqa: PLC0415

    class Connection:
        def __init__(self):
            self.pgconn = types.SimpleNamespace(
                transaction_status=TransactionStatus.IDLE
            )

        @classmethod
        async def connect(cls, _conninfo, **_kwargs):
            return cls()

        async def __aenter__(self):
            return self

        async def __aexit__(self, *_):
            pass

        async def close(self):
            pass

    @contextlib.asynccontextmanager
    async def opened(count):
        pool = AsyncConnectionPool(
            connection_class=Connection, min_size=count, max_size=count, open=False
        )
        async with pool:
            await pool.wait()
            yield pool.connection  # waits 30 s

    return Peer(_named("psycopg-pool"), opened)


def _named(package):
    return f"{package} {version(package)}"


def peers():
    """Return this pool and all others that are installed. Print which are left out."""
    found = []
    for adapter in (
        ours,
        predecessor,
        generic_connection_pool,
        aiosqlitepool,
        sqlalchemy_async,
        psycopg_pool,
    ):
        try:
            found.append(adapter())
        except Exception as error:  # noqa: BLE001  (not installed, or no network)
            print(f"left out: {adapter.__name__}: {error}", file=sys.stderr)
    return found
