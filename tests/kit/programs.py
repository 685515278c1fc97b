"""
Runs programs in new processes, without the time that each start of Python takes.

One process imports the libraries, and then forks for each program. Each program runs in
its own namespace, and ends as the Python interpreter ends.

All programs have the same memory addresses and hash seed. A test that needs others
starts a Python itself. So does one that measures memory or looks at `sys.modules`.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import attrs

from kit.console import Ended
from kit.processes import PATHS


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


__all__ = ["BARE", "WARM", "Programs"]


BARE = ("fastapi", "fastapi_topaz.testing")
"""These imports take most of the time of a start. None belongs to an extra."""

WARM = (
    *BARE,
    "anyio._backends._asyncio",
    "anyio._backends._trio",
    "fastapi_topaz._cli.commands",
    "fastapi_topaz._cli.demo_command",
    "fastapi_topaz._cli.doctor_command",
    "fastapi_topaz._cli.load_command",
    "fastapi_topaz._cli.routes_command",
    "fastapi_topaz._http2.asyncio_io",
    "fastapi_topaz._http2.trio_io",
    "fastapi.testclient",
    "hypercorn.trio",
    "multiprocessing.context",
    "opentelemetry.exporter.prometheus",
    "opentelemetry.sdk.metrics.export",
    "opentelemetry.sdk.trace.export",
    "uvicorn.protocols.http.auto",
)
"""The modules that most programs of the tests import."""

FORKS = """
import gc, importlib, json, os, sys, warnings

for name in sys.argv[1:]:
    importlib.import_module(name)
gc.freeze()

def forked():
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

if task := forked():
    for number, name in enumerate([os.devnull, task["out"], task["err"]]):
        file = os.open(name, os.O_RDWR | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(task["cwd"])
    sys.path.insert(0, "")
    os.environ.clear()
    os.environ.update(task["env"])
    sys.argv[1:] = task["arguments"]
    warnings.resetwarnings()
    if task["strict"]:
        warnings.simplefilter("error")
    else:
        # What Python ignores by default.
        ignored = DeprecationWarning, PendingDeprecationWarning, ImportWarning
        for each in (*ignored, ResourceWarning):
            warnings.simplefilter("ignore", each)
        warnings.filterwarnings("default", "", DeprecationWarning, "__main__")
    exec(compile(task["code"], "<string>", "exec"), {"__name__": "__main__"})
"""


@attrs.define
class Programs:
    """
    The process that forks. It runs within `with`.

    Args:
        folder: The folder for the output of each program.
        modules: The modules that the process imports before it forks.
    """

    folder: Path
    modules: Iterable[str] = WARM
    _numbers: Any = attrs.field(init=False, factory=itertools.count)
    _process: Any = attrs.field(init=False, default=None)

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            # -P: it imports the package that is tested, and not the sources in the
            # working directory.
            [sys.executable, "-P", "-c", FORKS, *self.modules],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, PATHS))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        # This also kills processes that a program has left running.
        os.killpg(self._process.pid, signal.SIGKILL)
        with self._process:
            pass

    def run(
        self,
        code: str,
        *arguments: str,
        strict: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> Ended:
        """
        Run *code*, and return how it ended.

        The program must wait for its own children. What they write later is lost.

        Args:
            code: The program.
            arguments: Its arguments.
            strict: Whether warnings are errors in it.
            env: Its environment. None: that of the tests.
            cwd: Its working directory. None: that of the tests.
        """
        number = next(self._numbers)
        out, err = self.folder / f"{number}.out", self.folder / f"{number}.err"
        task = {
            "code": textwrap.dedent(code),
            "arguments": arguments,
            "strict": strict,
            "env": dict(os.environ if env is None else env),
            "cwd": str(cwd or Path.cwd()),
            "out": str(out),
            "err": str(err),
        }
        self._process.stdin.write(f"{json.dumps(task)}\n")
        self._process.stdin.flush()
        try:
            line = self._process.stdout.readline()
        except BaseException:  # the test takes too long
            # This also ends the children of the program. Without it, the result of the
            # program would be read as that of the next one.
            self.__exit__()
            self.__enter__()
            raise
        if not line:
            raise RuntimeError("the process that forks has ended; see its stderr")
        status = int(line)
        return Ended(status, out.read_text("utf-8"), err.read_text("utf-8"))
