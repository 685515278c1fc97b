"""What a pool knows and decides, without I/O and without a clock."""
