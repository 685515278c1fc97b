"""Runs the console script as `python -m fastapi_topaz`."""

from fastapi_topaz.cli import main


if __name__ == "__main__":
    main()
