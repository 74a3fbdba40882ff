"""One point of a sweep, from its shape to its record."""
