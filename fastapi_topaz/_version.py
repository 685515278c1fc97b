"""Which version of the package this is; the build reads it from here."""

__all__ = ["VERSION"]


VERSION = "0.1.0"
