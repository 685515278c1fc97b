"""
The pool without FastAPI, in any program on asyncio or trio.

    python plain_anyio.py trio
"""

from __future__ import annotations

import os
import sys

import anyio

from fastapi_topaz import AuthorizerOptions, ConnectionPool, Identity, IdentityType


USERS = ("alice", "bob", "mallory")
DOCUMENTS = ("1", "2")


async def main() -> None:
    pool = ConnectionPool(max_connections=2)
    pool.configure(
        AuthorizerOptions(
            url=os.environ.get("TOPAZ_URL", "127.0.0.1:8282"), insecure=True
        )
    )
    rights: dict[tuple[str, str], bool] = {}

    async def ask(user: str, document: str) -> None:
        # There are more tasks than connections. The others wait here, in order.
        async with pool.acquire() as conn:
            decisions = await conn.decisions(
                policy_path="myapp.GET.documents.__id",
                identity=Identity(IdentityType.MANUAL, user),
                resource_context={"id": document},
                timeout=2.0,
            )
        rights[user, document] = decisions.get("allowed") is True

    # Opens the pool, and closes it at the end, also after an error.
    async with pool, anyio.create_task_group() as tasks:
        for user in USERS:
            for document in DOCUMENTS:
                tasks.start_soon(ask, user, document)

    for (user, document), may in sorted(rights.items()):
        print(f"{user} {'may' if may else 'may not'} read {document}")


if __name__ == "__main__":
    anyio.run(main, backend=sys.argv[1] if len(sys.argv) > 1 else "asyncio")
