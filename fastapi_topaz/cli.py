"""The console script `fastapi-topaz-pool`; its commands need the extra `demo`."""

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
    Run the command of the command line, and end Python with its exit code.

    Args:
        argv: The arguments; None means those that Python was started with.

    Raises:
        SystemExit: Always. 0 if all went well, 1 if something failed, 2 if it was
            called in the wrong way, 130 after Ctrl-C.
    """
    try:
        # Not above: the script is installed without the extra, too.
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
