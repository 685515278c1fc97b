"""What `test_workers.py` has servers serve, and how it looks after them."""
