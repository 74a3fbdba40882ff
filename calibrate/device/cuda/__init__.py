"""CUDA GPUs: the kind, its timer, its watch, and what Inductor does while others time."""
