"""
A pytest plugin that runs the tests once for each mutant, each in its own fork.

The tests are collected once. For a mutant, only tests that reach its function run, the
quickest first, until one fails. Most mutants take a few hundredths of a second. The
plugin reads the names of the mutants from the file in MUTANTS, and writes the outcome
of each mutant there.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import time
import warnings
from pathlib import Path

import pytest
from mutmut.mutation import trampoline


UNCHANGED = "unchanged"

CHILDREN = int(os.environ.get("MUTANT_CHILDREN", "2"))

PATIENCE = 8
"""Seconds. If no task has a timer, virtual time stops, and the test never ends."""


def pytest_runtestloop(session):
    if session.testsfailed or session.config.option.collectonly:
        return None
    file = Path(os.environ["MUTANTS"])
    names = json.loads(file.read_text())
    reached, seconds = clean_run(session)
    if session.testsfailed:
        return True
    # Existing objects are not garbage: no child has to look through them.
    gc.collect()
    gc.freeze()
    fates, running = {}, {}
    # No mutant: this run must pass, or mutants may die of the same failure.
    reached[UNCHANGED] = list(session.items)
    for name in [UNCHANGED, *names]:
        items = reached.get(name.partition("__mutmut_")[0], [])
        if not items:
            fates[name] = "unreached"
            continue
        items.sort(key=seconds.get)
        while len(running) >= CHILDREN:
            reap(running, fates)
        limit = 15 + 4 * sum(map(seconds.get, items))
        child = spawn(session, name, items, seconds, limit)
        running[child] = name, time.monotonic() + limit
    while running:
        reap(running, fates)
    if fates.pop(UNCHANGED) != "survived":
        raise pytest.UsageError("the tests fail without any mutant, in this order")
    file.write_text(json.dumps(fates))
    return True


def clean_run(session):
    """
    Run all tests unchanged. Return which tests reach a function, and their durations.
    """
    hits, reached, seconds = set(), {}, {}
    trampoline.record_trampoline_hit = lambda name, **_: hits.add(name)
    trampoline.set_mutant_under_test("stats")
    for item, following in zip(session.items, [*session.items[1:], None], strict=True):
        hits.clear()
        began = time.perf_counter()
        run(item, following)
        seconds[item] = time.perf_counter() - began
        for name in hits:
            reached.setdefault(name, []).append(item)
    trampoline.set_mutant_under_test("")
    return reached, seconds


def run(item, following):
    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)


def spawn(session, name, items, seconds, limit):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about threads and forks
        child = os.fork()
    if child:
        return child
    session.config.pluginmanager.unregister(name="terminalreporter")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 1))
    trampoline.set_mutant_under_test(name)
    try:
        for item, following in zip(items, [*items[1:], None], strict=True):
            # One test that never ends must not use the time of all tests.
            signal.setitimer(signal.ITIMER_REAL, PATIENCE + 20 * seconds[item])
            run(item, following)
            if session.testsfailed:
                os._exit(1)
        os._exit(0)
    except BaseException:  # noqa: BLE001  (for example KeyboardInterrupt of a mutant)
        os._exit(1)


def reap(running, fates):
    """Record the outcome of the next child that ends."""
    while True:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in running:
            name, _ = running.pop(child)
            code = os.waitstatus_to_exitcode(status)
            late = code in {-signal.SIGKILL, -signal.SIGXCPU, -signal.SIGALRM}
            fates[name] = "late" if late else "killed" if code else "survived"
            return
        for late, (_, deadline) in running.items():
            if time.monotonic() > deadline:
                os.kill(late, signal.SIGKILL)
        time.sleep(0.005)


@pytest.hookimpl(trylast=True)
def pytest_report_header():
    return f"mutants: {CHILDREN} children at once"
