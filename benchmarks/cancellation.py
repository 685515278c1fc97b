"""
Tests whether a pool loses connections if waiting tasks are cancelled.

    .venv/bin/python benchmarks/cancellation.py [--rounds 50] [--seed 1]
        [--only ours] [--quick] [--save]

In each round, 1,000 tasks wait for one of 10 connections. Each is cancelled at a random
moment. Meanwhile 20 other tasks take and release leases. In one of three cases, the
cancelled task is the one that has waited longest. It is about to get a connection,
which is the hardest case for a pool. Each pool is tested with anyio's cancel scopes and
with `Task.cancel()`.

If a connection cannot be leased after all tasks ended, the pool lost it. If a cancelled
task ends without a cancellation, the pool swallowed it.

This pool is tested on all backends, the others on asyncio. `pip install --group peers`
installs the others. Missing ones are left out. If this pool loses or swallows anything,
the exit code is 1.
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
"""Maximum number of checkpoints during a lease."""

AT_ONCE = (2, 4, 8)
"""Maximum number of tasks cancelled between two checkpoints. Each round uses one."""

OLDEST = 1 / 3
"""The share of cancelled tasks that had waited longest."""

PATIENCE = 5.0
"""Time limit in seconds, after the last cancellation and again to close the pool."""

FREE = 1.0
"""Time limit in seconds to lease all connections after all tasks ended."""

LIMIT = 15.0
"""Time limit in seconds for a round. Some stuck tasks can only be killed."""

GIVE_UP = 3
"""After this number of stuck rounds, the remaining rounds are left out."""


@dataclasses.dataclass
class Tally:
    """
    The counts of all rounds.

    Attributes:
        cancelled: Tasks that were cancelled and ended as cancelled.
        served: Tasks that ended before they could be cancelled.
        swallowed: Tasks that were cancelled but did not end as cancelled.
        lost: Connections that could not be leased at the end.
        stuck: Rounds in which a task never ended, or the pool did not close.
        killed: Stuck rounds that had to be killed, and so have no counts.
        leases: Leases that all tasks got. If there are few, little was tested.
        errors: Other errors, by name.
        rounds: Rounds that were run.
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
    """A task that is cancelled with a cancel scope."""

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
        except Exception as error:  # noqa: BLE001  (counted in the table)
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
    """A task that is cancelled once with `Task.cancel()`."""

    def __init__(self, round_):
        super().__init__(round_)
        self.asked = False

    def start(self, tasks):  # noqa: ARG002  (a task group would be cancelled too)
        self.task = asyncio.get_running_loop().create_task(self.round.lease_once())
        self.task.add_done_callback(self.end)

    def end(self, task):
        if not task.cancelled() and task.exception() is not None:
            self.round.failed(task.exception())
        self.ended(asked=self.asked, heard=task.cancelled())

    def cancel(self):
        self.asked = self.task.cancel()


class Round:
    """One pool and all its tasks."""

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
        # A cancellation during the release must be delivered here.
        await checkpoint()

    async def lease_on(self):
        while not self.over:
            try:
                await self.lease_once()
            except Exception as error:  # noqa: BLE001  (counted in the table)
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
        """Cancel all remaining tasks, a few between two checkpoints."""
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
        """Return the number of connections that cannot be leased."""
        got = 0
        async with contextlib.AsyncExitStack() as leases:
            with anyio.move_on_after(FREE):
                for _ in range(CONNECTIONS):
                    try:
                        await leases.enter_async_context(self.lease())
                        got += 1
                    except Exception as error:  # noqa: BLE001  (counted in the table)
                        self.failed(error)
        return CONNECTIONS - got


WAITERS_BY = {"scope": Waiter, "Task": NativeWaiter}


def play(name, backend, how, seed, numbers, results):
    """Run the rounds *numbers* in this child process, and send the tally of each."""
    logging.disable(logging.CRITICAL)  # pools log what is counted here
    with contextlib.redirect_stderr(io.StringIO()):
        peer = next(each for each in peers() if each.name == name)
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        tally = Tally()
        run(backend, Round(peer, WAITERS_BY[how], rng, tally).run)
        results.send(tally)


def tally_of(name, backend, how, options):
    """Run all rounds in another process. If it hangs, replace it."""
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
