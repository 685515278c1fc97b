"""An asyncio loop that runs the tasks that are ready in any order, as trio does."""

from __future__ import annotations

import itertools
import random
import weakref

from kit.autojump import AutojumpLoop


# What the callbacks are called that run a task: its first step and those after a bare
# `yield`, and those after something it waited for; in C and in Python.
_STEPS = frozenset({"TaskStepMethWrapper", "__step", "task_wakeup", "__wakeup"})


def is_step(handle):
    """Say whether *handle* runs a task, and is no other callback."""
    callback = handle._callback
    return getattr(callback, "__name__", type(callback).__name__) in _STEPS


class ShuffledLoop(AutojumpLoop):
    """
    A loop in virtual time that shuffles the tasks that are ready, by a seed.

    asyncio promises that callbacks run in the order they were scheduled, and relies on
    it itself: those of one future come in the order they were added, a cancellation
    that a scope of anyio has scheduled comes before what is scheduled after it, and
    `run_until_complete` ends after all that. So a callback that runs no task stays
    where it is, and no task passes one. Nobody promises in which order several tasks
    run that are ready at once: only neighbours among those change places.

    Timers and sockets add no steps of tasks themselves, only what makes tasks ready
    for the next iteration; so what is ready before an iteration is all there is.

    The same seed gives the same order in another process, too: tasks are sorted before
    they are shuffled, because what woke them may have gone through a set of theirs,
    whose order is that of addresses.
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
    """Return a loop whose order, and all else that is left to chance, is of *seed*."""
    # What the pool throws dice for: jitter of pauses and lifetimes.
    random.seed(seed)
    return ShuffledLoop(seed)
