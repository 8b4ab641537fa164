"""Data, not code: the bundled checkpoint in `shapes/` (see README.md)."""
