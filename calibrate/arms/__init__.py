"""What is timed: linears and blocks of layers, in bf16 and in float8."""
