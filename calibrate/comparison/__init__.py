"""Two tables of one recipe compared; a table compared with what its device measures now."""
