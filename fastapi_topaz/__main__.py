"""`python -m fastapi_topaz` is the console script."""

from fastapi_topaz.cli import main


if __name__ == "__main__":
    main()
