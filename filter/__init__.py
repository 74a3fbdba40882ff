"""The runtime side: read a table, decide layer by layer. Light: needs only PyYAML and msgspec."""
