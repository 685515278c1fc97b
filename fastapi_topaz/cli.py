"""The console script `fastapi-topaz-pool`. Its commands need the extra `demo`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final, NoReturn

from fastapi_topaz._distribution import DISTRIBUTION


if TYPE_CHECKING:
    from collections.abc import Sequence


__all__ = ["main"]


EXTRA: Final = frozenset({"httpx", "hypercorn", "rich", "trio", "typer", "uvicorn"})
WRONG_USAGE: Final = 2
INTERRUPTED: Final = 130


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """
    Run the command given on the command line, then exit with its exit code.

    Args:
        argv: The arguments. None, the default, means `sys.argv`.

    Raises:
        SystemExit: Always. The code is 0 for success, 1 for a failure, 2 for wrong
            usage, 130 after Ctrl-C.
    """
    try:
        # Imported here, because the script is also installed without the extra.
        from fastapi_topaz._cli.demo_command import commands  # noqa: PLC0415

        commands(args=argv, prog_name=DISTRIBUTION)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRA:
            raise
        _complain(f"{error.name} is missing: pip install '{DISTRIBUTION}[demo]'")
        sys.exit(WRONG_USAGE)
    except KeyboardInterrupt:
        _complain("Interrupted.")
        sys.exit(INTERRUPTED)
    sys.exit()


def _complain(message: str) -> None:
    sys.stderr.write(f"{message}\n")
