"""The version of the package. The build reads it from here."""

__all__ = ["VERSION"]


VERSION = "1.0.0"
