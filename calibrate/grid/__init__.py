"""Which shapes a sweep measures."""
