"""Data, not code: the bundled checkpoints in `shapes/` and `shapes-dit/` (see README.md)."""
