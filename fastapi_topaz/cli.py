"""
The console script `fastapi-topaz-pool`.

Its commands need the extra `cli`, and `demo` needs the extra of that name.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final, NoReturn

from fastapi_topaz._distribution import DISTRIBUTION


if TYPE_CHECKING:
    from collections.abc import Sequence


__all__ = ["main"]


EXTRAS: Final = {
    "cryptography": "cli",
    "rich": "cli",
    "typer": "cli",
    "trio": "cli,trio",
    "httpx": "demo",
    "hypercorn": "demo",
    "uvicorn": "demo",
}
"""The extras that install a library."""

WRONG_USAGE: Final = 2
INTERRUPTED: Final = 130


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """
    Run the command given on the command line, then exit with its exit code.

    Args:
        argv: The arguments. None, the default, means `sys.argv`.

    Raises:
        SystemExit: Always. The code is 0 for success, 1 for a failure or a problem
            found, 2 for wrong usage, 3 if a load test did not reach its rate, 130 after
            Ctrl-C.
    """
    try:
        # Imported here, because the script is also installed without the extras.
        from fastapi_topaz._cli.commands import commands  # noqa: PLC0415

        commands(args=argv, prog_name=DISTRIBUTION)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        if "demo" in (sys.argv[1:] if argv is None else argv):
            extra = "demo"
        _complain(f"{error.name} is missing: pip install '{DISTRIBUTION}[{extra}]'")
        sys.exit(WRONG_USAGE)
    except KeyboardInterrupt:
        _interrupted()
    except BaseExceptionGroup as group:
        # On trio, Ctrl-C is raised in one of the tasks.
        if group.split(KeyboardInterrupt)[1] is not None:
            raise
        _interrupted()
    sys.exit()


def _interrupted() -> NoReturn:
    _complain("Interrupted.")
    sys.exit(INTERRUPTED)


def _complain(message: str) -> None:
    sys.stderr.write(f"{message}\n")
