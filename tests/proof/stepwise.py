"""
Event loops that are driven from outside, one step at a time and in virtual time.

Between two steps every task waits, and the clock stands still until it is told to
move. So a test may look at a pool at any moment and know that nothing is left that
could still happen by itself: who waits then, waits in earnest.
"""

from __future__ import annotations

import asyncio
import math
import selectors
from collections import deque

import trio
import trio.testing
from hypothesis import settings


RESTLESS = 5_000
"""Turns of a loop, or timers, in one step that are too many."""


def chosen_settings(examples, steps):
    """Return those of a model: more *examples* if the profile has more than usual."""
    deep = max(1, settings().max_examples // 100)
    return settings(
        max_examples=examples * deep,
        stateful_step_count=steps,
        # By default the same examples each time, and anew in depth.
        derandomize=deep == 1,
        deadline=None,
        report_multiple_bugs=False,
    )


class Stuck(AssertionError):  # noqa: N818
    """The tasks do not come to rest, or the step itself would wait."""


class _StillSelector(selectors.DefaultSelector):
    def select(self, timeout=None):
        if timeout is None or timeout > 0:
            raise Stuck("a step waits for something")
        return []  # no sockets take part


class _StillLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self.now = 0.0
        super().__init__(_StillSelector())

    def time(self):
        return self.now


class OnAsyncio:
    """A loop of asyncio."""

    def __init__(self, eager=False):
        self.loop = _StillLoop()
        if eager:
            self.loop.set_task_factory(asyncio.eager_task_factory)
        self._tasks = set()

    def now(self):
        return self.loop.now

    def step(self, *actions, look=lambda: None):
        """Call *actions* in one tick, let every task go on until it waits, and look."""

        async def run():
            for action in actions:
                action()
            await self._settle()
            look()

        self.loop.run_until_complete(run())

    def advance(self, seconds, look):
        """Let time pass, and call *look* at each moment at which a timer went off."""

        async def run():
            end = self.loop.now + seconds
            for _ in range(RESTLESS):
                moment = self._next_timer()
                # asyncio calls a timer that is due within the clock's resolution, and
                # anyio, which compares exactly, sets it again: for that it must move.
                self.loop.now = moment if moment < end + 1e-6 else end
                await self._settle()
                look()
                if moment >= end:
                    return
            raise Stuck("timers go on and on")

        self.loop.run_until_complete(run())

    def jump(self, seconds):
        """Be late: all timers of these *seconds* go off together, in the next step."""
        now = self.loop.now + seconds
        # As in advance(): no timer may be due within the resolution of the clock.
        times = [x._when for x in self.loop._scheduled if not x._cancelled]
        self.loop.now = max((x for x in times if now < x <= now + 1e-6), default=now)

    def spawn(self, function):
        """Start a task; only in a step."""
        task = self.loop.create_task(function())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task.cancel

    def others(self):
        """Return how many tasks there are that this did not start; only in a step."""
        tasks = asyncio.all_tasks(self.loop) - self._tasks
        return len(tasks - {asyncio.current_task()})

    def timers(self):
        """Say whether there is a timer; only in a step."""
        return self._next_timer() < math.inf

    def close(self):
        """End, whatever is left."""
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        # What is shielded has limits of its own.
        self.advance(60, lambda: None)
        self.loop.close()

    def _next_timer(self):
        times = [x._when for x in self.loop._scheduled if not x._cancelled]
        soon = min(times, default=math.inf) + 1e-6
        return max((time for time in times if time <= soon), default=math.inf)

    async def _settle(self):
        rest = 0
        for _ in range(RESTLESS):
            await asyncio.sleep(0)
            # Twice: timers that are due become ready in a turn of their own.
            rest = 0 if self.loop._ready else rest + 1
            if rest == 2:
                return
        raise Stuck("tasks go on and on without time passing")


class OnTrio:
    """A run of trio, as the guest of whoever calls the methods."""

    def __init__(self):
        self._clock = trio.testing.MockClock()
        self._ticks = deque()
        self._jobs = deque()
        self._outcome = self._end = None
        self._ended = False
        trio.lowlevel.start_guest_run(
            self._main,
            run_sync_soon_threadsafe=self._ticks.append,
            done_callback=self._done,
            host_uses_signal_set_wakeup_fd=True,
            clock=self._clock,
        )

    def now(self):
        return self._clock.current_time()

    def step(self, *actions, look=lambda: None):
        async def run():
            for action in actions:
                action()
            await trio.testing.wait_all_tasks_blocked()
            look()

        self._run(run)

    def advance(self, seconds, look):
        async def run():
            end = self.now() + seconds
            for _ in range(RESTLESS):
                moment = self.now() + self._until_next_timer()
                self._clock.jump(max(0.0, min(end, moment) - self.now()))
                await trio.testing.wait_all_tasks_blocked()
                look()
                if moment >= end:
                    return
            raise Stuck("timers go on and on")

        self._run(run)

    def jump(self, seconds):
        self._clock.jump(seconds)

    def spawn(self, function):
        self._callers.start_soon(function)

    def others(self):
        # The main task and the two of trio itself are none of the pool's.
        living = trio.lowlevel.current_statistics().tasks_living
        return living - len(self._callers.child_tasks) - self._at_first

    def timers(self):
        return self._until_next_timer() < math.inf

    def close(self):
        if not self._ended:
            self._jobs.append(None)
            for _ in range(RESTLESS):
                if self._ended:
                    break
                self._ticks.popleft()()
            else:
                raise Stuck("the run does not end")
        if self._end is not None:
            self._end.unwrap()

    def _until_next_timer(self):
        return trio.lowlevel.current_statistics().seconds_to_next_deadline

    async def _main(self):
        self._at_first = trio.lowlevel.current_statistics().tasks_living
        async with trio.open_nursery() as self._callers:
            while True:
                # Never blocked, and so the run never goes to sleep in a thread.
                while not self._jobs:
                    await trio.lowlevel.checkpoint()
                job = self._jobs.popleft()
                if job is None:
                    break
                try:
                    await job()
                except Exception as error:  # noqa: BLE001
                    self._outcome = error
                else:
                    self._outcome = True
            self._callers.cancel_scope.cancel()
            # What is shielded has limits of its own, and nobody moves the clock now.
            self._clock.autojump_threshold = 0

    def _done(self, outcome):
        self._ended, self._end = True, outcome

    def _run(self, job):
        self._outcome = None
        self._jobs.append(job)
        for _ in range(20 * RESTLESS):
            if self._outcome is not None:
                break
            if self._ended:
                self._end.unwrap()
            self._ticks.popleft()()
        else:
            raise Stuck("tasks go on and on without time passing")
        if self._outcome is not True:
            raise self._outcome
