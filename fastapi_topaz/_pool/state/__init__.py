"""The state of a pool and its decisions, without I/O and without a clock."""
