"""
Event loops that a test drives from outside, step by step and in virtual time.

Between two steps every task waits, and the clock stands still until the test moves it.
So a test can check a pool at any moment, and knows that no task can continue by itself.
A caller that waits then is really waiting.
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
"""The number of loop iterations or timers in one step that counts as endless."""


def chosen_settings(examples, steps):
    """
    Return the settings of a model.

    Half of the *examples* by default, and a multiple of them if the profile asks for
    more.
    """
    deep = max(1, settings().max_examples // 100)
    return settings(
        max_examples=examples * deep if deep > 1 else examples // 2,
        stateful_step_count=steps,
        # By default the same examples each time, and new ones in the deep profile.
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
        return []  # no sockets are used


class _StillLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self.now = 0.0
        super().__init__(_StillSelector())

    def time(self):
        return self.now


class OnAsyncio:
    """An asyncio loop."""

    def __init__(self, eager=False):
        self.loop = _StillLoop()
        if eager:
            self.loop.set_task_factory(asyncio.eager_task_factory)
        self._tasks = set()

    def now(self):
        return self.loop.now

    def step(self, *actions, look=lambda: None):
        """
        Run *actions* in one tick, run all tasks until each waits, and call *look*.
        """

        async def run():
            for action in actions:
                action()
            await self._settle()
            look()

        self.loop.run_until_complete(run())

    def advance(self, seconds, look):
        """Let time pass, and call *look* each time a timer has fired."""

        async def run():
            end = self.loop.now + seconds
            for _ in range(RESTLESS):
                moment = self._next_timer()
                # asyncio calls a timer that is due within the clock's resolution. anyio
                # compares exactly and sets the timer again. So the clock must move on.
                self.loop.now = moment if moment < end + 1e-6 else end
                await self._settle()
                look()
                if moment >= end:
                    return
            raise Stuck("timers go on and on")

        self.loop.run_until_complete(run())

    def jump(self, seconds):
        """
        Simulate a late loop: all timers of these *seconds* fire together in the next
        step.
        """
        now = self.loop.now + seconds
        # As in advance(): no timer may be due within the clock's resolution.
        times = [x._when for x in self.loop._scheduled if not x._cancelled]
        self.loop.now = max((x for x in times if now < x <= now + 1e-6), default=now)

    def spawn(self, function):
        """Start a task; only within a step."""
        task = self.loop.create_task(function())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task.cancel

    def others(self):
        """
        Return the number of tasks that this object did not start; only within a step.
        """
        tasks = asyncio.all_tasks(self.loop) - self._tasks
        return len(tasks - {asyncio.current_task()})

    def timers(self):
        """Return whether there is a timer; only within a step."""
        return self._next_timer() < math.inf

    def close(self):
        """End the run, whatever tasks are left."""
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        # Shielded code has its own time limits.
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
            # Twice: due timers become ready in a separate iteration.
            rest = 0 if self.loop._ready else rest + 1
            if rest == 2:
                return
        raise Stuck("tasks go on and on without time passing")


class OnTrio:
    """A trio run, in guest mode, driven by the methods."""

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
        # The main task and two of trio's own tasks do not belong to the pool.
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
                # Never blocked, so the run never sleeps in a thread.
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
            # Shielded code has its own time limits, and nothing moves the clock now.
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
