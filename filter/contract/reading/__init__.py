"""Files from anyone become plain data in bounded time and memory, or an error that names file and field."""
