"""The version of the package. The build reads it from here."""

__all__ = ["VERSION"]


VERSION = "0.1.0"
