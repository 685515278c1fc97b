"""
Whether a pool loses connections when those who wait for one are cancelled.

    .venv/bin/python benchmarks/cancellation.py [--rounds 50] [--seed 1]
        [--only ours] [--quick] [--save]

In each round 1,000 tasks want one of 10 connections, and each is cancelled at a random
moment, while 20 others go on taking leases and giving them back. One time in three it
is the one that has waited longest, which is about to be served: the moment that is
hardest to get right. Once with scopes of anyio and once with `Task.cancel()`. What
holds a connection when everybody is gone has lost it; a task that was cancelled and
ends in another way has swallowed that.

Ours is tried on all backends, the others on asyncio. They come with
`pip install --group peers`; those that are missing are left out. The exit code is 1 if
ours loses or swallows anything.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import io
import logging
import multiprocessing
import random
import sys

import anyio
from _peers import BACKENDS, OURS, peers, run
from _rounds import Verdict, parsed, parser, save, versions
from anyio.lowlevel import checkpoint


CONNECTIONS = 10
WAITERS = 1000
OTHERS = 20
HELD = 6
"""Checkpoints that a lease is held for, at most."""

AT_ONCE = (2, 4, 8)
"""Tasks cancelled between two checkpoints, at most: one of these in each round."""

OLDEST = 1 / 3
"""The share of the cancelled that had waited longest."""

PATIENCE = 5.0
"""Seconds that a round may take after the last was cancelled, and to close the pool."""

FREE = 1.0
"""Seconds to lease all connections once they should be free."""

LIMIT = 15.0
"""Seconds for a round. Some tasks that are stuck cannot be cancelled, only killed."""

GIVE_UP = 3
"""Rounds in which somebody may be stuck before the rest is left out."""


@dataclasses.dataclass
class Tally:
    """
    What became of all rounds.

    Attributes:
        cancelled: Tasks that were cancelled, and ended so.
        served: Tasks that had ended before it was their turn to be cancelled.
        swallowed: Tasks that were cancelled and ended in another way.
        lost: Connections that nobody could get in the end.
        stuck: Rounds in which somebody waited for ever, or the pool did not close.
        killed: Those of them that ended only with the process, and told nothing.
        leases: Those that anybody got; where they are few, little was tried.
        errors: Whatever else was raised, by name.
        rounds: Rounds that were played.
    """

    cancelled: int = 0
    served: int = 0
    swallowed: int = 0
    lost: int = 0
    stuck: int = 0
    killed: int = 0
    leases: int = 0
    errors: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    rounds: int = 1

    def add(self, other):
        for field in dataclasses.fields(self):
            mine, its = getattr(self, field.name), getattr(other, field.name)
            setattr(self, field.name, mine + its)

    def row(self):
        numbers = (
            self.rounds,
            self.leases,
            self.cancelled,
            self.served,
            self.swallowed,
            self.lost,
            self.stuck,
        )
        told = ", ".join(f"{count} {name}" for name, count in self.errors.items())
        return "".join(f"{number:>10,}" for number in numbers) + f"  {told}"


class Waiter:
    """One who is cancelled, with a scope."""

    def __init__(self, round_):
        self.round = round_
        self.scope = anyio.CancelScope()
        self.done = False

    def start(self, tasks):
        tasks.start_soon(self.take)

    async def take(self):
        try:
            with self.scope:
                await self.round.lease_once()
        except Exception as error:  # noqa: BLE001  (told in the table)
            self.round.failed(error)
        self.ended(asked=self.scope.cancel_called, heard=self.scope.cancelled_caught)

    def ended(self, *, asked, heard):
        self.done = True
        tally = self.round.tally
        tally.cancelled += heard
        tally.swallowed += asked and not heard
        tally.served += not asked and not heard

    def cancel(self):
        self.scope.cancel()


class NativeWaiter(Waiter):
    """One who is cancelled as asyncio does it, once."""

    def __init__(self, round_):
        super().__init__(round_)
        self.asked = False

    def start(self, tasks):  # noqa: ARG002  (they would be cancelled with it)
        self.task = asyncio.get_running_loop().create_task(self.round.lease_once())
        self.task.add_done_callback(self.end)

    def end(self, task):
        if not task.cancelled() and task.exception() is not None:
            self.round.failed(task.exception())
        self.ended(asked=self.asked, heard=task.cancelled())

    def cancel(self):
        self.asked = self.task.cancel()


class Round:
    """One pool, and all who want something of it."""

    def __init__(self, peer, waiter, rng, tally):
        self.peer = peer
        self.waiter = waiter
        self.random = rng
        self.tally = tally
        self.over = False

    def failed(self, error):
        self.tally.errors[type(error).__name__] += 1

    async def lease_once(self):
        async with self.lease():
            self.tally.leases += 1
            for _ in range(self.random.randint(0, HELD)):
                await checkpoint()
        # A cancellation that came while it ended is due here.
        await checkpoint()

    async def lease_on(self):
        while not self.over:
            try:
                await self.lease_once()
            except Exception as error:  # noqa: BLE001  (told in the table)
                self.failed(error)

    async def run(self):
        stack = contextlib.AsyncExitStack()
        self.lease = await stack.enter_async_context(self.peer.open(CONNECTIONS))
        with anyio.CancelScope() as limit:
            async with anyio.create_task_group() as tasks:
                for _ in range(OTHERS):
                    tasks.start_soon(self.lease_on)
                await checkpoint()
                waiters = [self.waiter(self) for _ in range(WAITERS)]
                for each in waiters:
                    each.start(tasks)
                await self.cancel_all(list(waiters))
                limit.deadline = anyio.current_time() + PATIENCE
                self.over = True
                while not all(each.done for each in waiters):
                    await checkpoint()
        stuck = limit.cancelled_caught
        self.tally.lost += await self.missing()
        with anyio.move_on_after(PATIENCE) as limit:
            await stack.aclose()
        self.tally.stuck += stuck or limit.cancelled_caught

    async def cancel_all(self, waiters):
        """Cancel everybody who is left, a few between two checkpoints."""
        await checkpoint()
        left = waiters
        most = self.random.choice(AT_ONCE)
        while left:
            for _ in range(min(len(left), self.random.randint(0, most))):
                oldest = self.random.random() < OLDEST
                left.pop(0 if oldest else self.random.randrange(len(left))).cancel()
            await checkpoint()
            left = [each for each in left if not each.done]

    async def missing(self):
        """Return how many connections nobody can get."""
        got = 0
        async with contextlib.AsyncExitStack() as leases:
            with anyio.move_on_after(FREE):
                for _ in range(CONNECTIONS):
                    try:
                        await leases.enter_async_context(self.lease())
                        got += 1
                    except Exception as error:  # noqa: BLE001  (told in the table)
                        self.failed(error)
        return CONNECTIONS - got


WAITERS_BY = {"scope": Waiter, "Task": NativeWaiter}


def play(name, backend, how, seed, numbers, results):
    """Play these rounds, and send what became of each; in a process of its own."""
    logging.disable(logging.CRITICAL)  # pools tell of what is counted here
    with contextlib.redirect_stderr(io.StringIO()):
        peer = next(each for each in peers() if each.name == name)
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        tally = Tally()
        run(backend, Round(peer, WAITERS_BY[how], rng, tally).run)
        results.send(tally)


def tally_of(name, backend, how, options):
    """Play all rounds, in a process that is replaced when it hangs."""
    rounds, give_up = options.rounds, 1 if options.quick else GIVE_UP
    total = Tally(rounds=0)
    context = multiprocessing.get_context("spawn")
    while total.rounds < rounds and total.stuck < give_up:
        receiver, sender = context.Pipe(duplex=False)
        left = range(total.rounds, rounds)
        process = context.Process(
            target=play,
            args=(name, backend, how, options.seed, left, sender),
            daemon=True,
        )
        process.start()
        sender.close()
        try:
            for _ in left:
                hangs = not receiver.poll(LIMIT)
                total.add(Tally(stuck=1, killed=1) if hangs else receiver.recv())
                if hangs or total.stuck >= give_up:
                    break
        except EOFError:
            total.add(Tally(stuck=1, killed=1))
            total.errors["crash"] += 1
        process.kill()
        process.join()
    return total


def main(options):
    print(versions("fastapi-topaz-pool", "anyio", "trio", "uvloop"))
    print(f"{options.rounds} rounds of {WAITERS} tasks, --seed {options.seed}")
    found = [peer for peer in peers() if not options.only or options.only in peer.name]
    if not found:
        sys.exit(f"no pool is called {options.only!r}")
    width = max(len(peer.name) for peer in found)
    heads = ("rounds", "leases", "cancelled", "served", "swallowed", "lost", "stuck")
    head = "".join(f"{each:>10}" for each in heads)
    print(f"  {'':<{width}}  {'':<15}{head}  errors")
    table = []
    for peer in found:
        for backend in BACKENDS if peer.name == OURS else ("asyncio",):
            for how in WAITERS_BY:
                if backend == "trio" and how == "Task":
                    continue
                tally = tally_of(peer.name, backend, how, options)
                row = f"  {peer.name:<{width}}  {backend:<8} {how:<6}{tally.row()}"
                print(row, flush=True)
                table.append(
                    {"name": peer.name, "backend": backend, "how": how, **vars(tally)}
                )
    ours = [row for row in table if row["name"] == OURS]
    if not ours:
        return 0
    bad = {key: sum(row[key] for row in ours) for key in ("lost", "swallowed", "stuck")}
    told = ", ".join(f"{count} {key}" for key, count in bad.items())
    told += f" of {sum(row['cancelled'] for row in ours):,} cancelled"
    goal = Verdict(f"{OURS} loses and swallows nothing", told, not any(bad.values()))
    print(goal)
    save(
        options,
        "cancellation",
        {"title": "Mass cancellation", "table": table, "goals": [goal]},
    )
    return 0 if goal.met else 1


if __name__ == "__main__":
    arguments = parser(__doc__, rounds=50)
    arguments.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments.add_argument("--only", help="those whose name has this in it")
    sys.exit(main(parsed(arguments, rounds=1)))
