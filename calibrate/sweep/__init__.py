"""Many points, from a grid to tables."""
