"""A sweep by the ranks of torchrun."""
