"""Which linears of a model's compiled block to convert together: `plan` measures sets of them and writes the best."""

from fp8gate.calibrate.planning.plan_block import plan

__all__ = ["plan"]
