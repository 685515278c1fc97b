"""Servers that fail on request, for the tests only."""
