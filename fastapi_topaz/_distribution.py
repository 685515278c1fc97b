"""
The name of the distribution that installs this package: `fastapi-topaz-pool`.

On PyPI, `fastapi-topaz` is another library with the same import name. pip does not
notice if two distributions write into one folder. Then the folder holds modules of
both, and a program may import some of each.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


__all__ = ["DISTRIBUTION", "refuse_mixture"]


DISTRIBUTION = "fastapi-topaz-pool"

OTHER = "fastapi-topaz"


def refuse_mixture() -> None:
    """
    Check that `fastapi-topaz` has no files in the folder of this package.

    Raises:
        ImportError: `fastapi-topaz` has files there.
    """
    try:
        other = distribution(OTHER)
    except PackageNotFoundError:
        return
    here = Path(__file__).parent.resolve()
    for file in other.files or ():
        if here in Path(str(other.locate_file(file))).resolve().parents:
            raise ImportError(
                f"{OTHER} {other.version} is another library, and it is installed into "
                f"the same folder as {DISTRIBUTION}: {here}. Repair it with these two "
                f"commands:\n"
                f"  pip uninstall -y {OTHER} {DISTRIBUTION}\n"
                f"  pip install {DISTRIBUTION}\n"
                f"If pip does not find {DISTRIBUTION}, install it from a copy of its "
                "repository: pip install ."
            )
