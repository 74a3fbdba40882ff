"""Many points, to their tables."""
