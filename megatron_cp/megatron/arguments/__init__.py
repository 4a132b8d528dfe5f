"""Command-line flags: added, checked, filled in, and validated without a GPU."""
