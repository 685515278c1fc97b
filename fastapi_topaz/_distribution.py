"""
The name under which this package is installed: `fastapi-topaz-pool`.

On PyPI, `fastapi-topaz` is another library, with the same name for the import. pip does
not notice that two distributions write into one folder. The modules of both are mixed
then, and each program may get some of either.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


__all__ = ["DISTRIBUTION", "refuse_mixture"]


DISTRIBUTION = "fastapi-topaz-pool"

OTHER = "fastapi-topaz"


def refuse_mixture() -> None:
    """
    Return if no other distribution has files in the folder of this package.

    Raises:
        ImportError: The distribution `fastapi-topaz` has.
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
                f"  pip install {DISTRIBUTION}"
            )
