"""The applications and servers of `test_workers.py`, and helpers to check them."""
