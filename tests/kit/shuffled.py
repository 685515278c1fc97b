"""An asyncio loop that runs ready tasks in any order, as trio does."""

from __future__ import annotations

import itertools
import random
import weakref

from kit.autojump import AutojumpLoop


# The names of callbacks that run a task: its first step and steps after a bare `yield`,
# and steps after an awaited future; in C and in Python.
_STEPS = frozenset({"TaskStepMethWrapper", "__step", "task_wakeup", "__wakeup"})


def is_step(handle):
    """Return whether *handle* runs a task, and is not another callback."""
    callback = handle._callback
    return getattr(callback, "__name__", type(callback).__name__) in _STEPS


class ShuffledLoop(AutojumpLoop):
    """
    A loop in virtual time that shuffles the ready tasks, by a seed.

    asyncio promises that callbacks run in the order they were scheduled, and relies on
    it. The callbacks of one future run in the order they were added. A cancellation
    that an anyio scope has scheduled runs before later callbacks. `run_until_complete`
    ends after all these. So a callback that runs no task stays in its place, and no
    task overtakes it. But asyncio does not promise an order for several ready tasks. So
    only neighbouring tasks change places.

    Timers and sockets do not add steps of tasks. They add callbacks that make tasks
    ready for the next iteration. So before an iteration, all its ready tasks are known.

    The same seed gives the same order in another process, too. Tasks are sorted before
    they are shuffled, because the code that woke them may have iterated over a set of
    them. The order of such a set depends on addresses.
    """

    def __init__(self, seed):
        super().__init__()
        self.seed = seed
        self._random = random.Random(seed)
        self._numbers = weakref.WeakKeyDictionary()
        self._count = itertools.count()

    def __repr__(self):
        return f"<ShuffledLoop seed={self.seed}>"

    def _run_once(self):
        ready = self._ready
        # One by one, because other threads may add to it at any moment.
        handles = [ready.popleft() for _ in range(len(ready))]
        shuffled = []
        for steps, group in itertools.groupby(handles, key=is_step):
            neighbours = list(group)
            if steps:
                neighbours.sort(key=self._number)
                self._random.shuffle(neighbours)
            shuffled += neighbours
        ready.extendleft(reversed(shuffled))
        super()._run_once()

    def _number(self, handle):
        task = handle._callback.__self__
        if task not in self._numbers:
            self._numbers[task] = next(self._count)
        return self._numbers[task]


def shuffled_loop(seed):
    """Return a loop with an order, and other random choices, that depend on *seed*."""
    # The random choices of the pool: jitter of pauses and lifetimes.
    random.seed(seed)
    return ShuffledLoop(seed)
