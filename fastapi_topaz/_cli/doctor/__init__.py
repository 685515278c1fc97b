"""The checks of the command `doctor`, and the findings that they return."""
