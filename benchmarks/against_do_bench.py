"""A second opinion: `triton.testing.do_bench` on the graphs that the sweep times, at 20 shapes of all sizes.

do_bench times forward first and then backward, each for 0.1 s, and flushes L2 by writing zeros. The sweep runs each
arm, forward and backward in turn, until the clock has settled, and flushes by reading. LOG.md explains the differences
of more than 3 %.

Run it: python benchmarks/against_do_bench.py
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.progress import track
from tabulate import tabulate

from fp8gate.calibrate.arms.linear import LinearArm, Operands
from fp8gate.calibrate.device.cuda.timer import CudaTimer
from fp8gate.calibrate.device.registry import KINDS, describe_device, kind_of
from fp8gate.calibrate.device.timing_lock import TimingLock, timing_lock_file
from fp8gate.calibrate.grid.grid import grid_shapes, too_large
from fp8gate.calibrate.points.measure_point import measure_point
from fp8gate.calibrate.points.ready_point import make_ready
from fp8gate.calibrate.points.setup import make_setup
from fp8gate.calibrate.points.task_queue import Task
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Device

POINTS = 20


def main() -> None:
    device = torch.device("cuda")
    timer = CudaTimer(device)
    rows: list[tuple[object, ...]] = []
    try:
        for shape in track(spread_shapes(describe_device(device)), console=Console(stderr=True)):
            rows += compare(shape, timer, device)
    finally:  # after Ctrl-C too, show what has been measured
        headers = ("(m, k, n)", "bf16 us", "recipe", "do_bench", "sweep", "difference")
        print(tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github"))


def spread_shapes(device: Device) -> list[LinearShape]:
    """Shapes of the default grid, spread evenly over its range of work."""
    shapes = [
        shape
        for shape in grid_shapes(KINDS["cuda"].defaults.grids["default"])
        if not too_large(shape, device, on_grid=True)
    ]
    shapes.sort(key=lambda shape: (shape.flop, shape))
    step = (len(shapes) - 1) / (POINTS - 1)
    return [shapes[round(i * step)] for i in range(POINTS)]


def compare(shape: LinearShape, timer: CudaTimer, device: torch.device) -> list[tuple[object, ...]]:
    """A row for each recipe at one shape, with both opinions."""
    protocols = make_setup(device).protocols
    point = make_ready(Task(shape), protocols, device)
    with timing_lock_file() as lock:
        record = measure_point(point, timer, kind_of(device).make_watch(device), TimingLock(lock), device, seed=0)
    operands = Operands.random(shape, device)
    do_bench_us = {}
    for name, linear in point.linears.items():
        arm = linear.over(operands)
        timer.free([timer.prepare(arm)])  # warms it up
        do_bench_us[name] = bench_us(arm)
    operands.free()
    rows: list[tuple[object, ...]] = []
    for recipe, protocol in protocols.items():
        theirs = do_bench_us["bf16"] / do_bench_us[recipe]
        ours = record.speedup(recipe, protocol).estimate
        rows.append(
            (shape, f"{do_bench_us['bf16']:.1f}", recipe, f"{theirs:.3f}", f"{ours:.3f}", f"{ours / theirs - 1:+.1%}")
        )
    return rows


def bench_us(arm: LinearArm) -> float:
    """Forward plus backward, each as a CUDA graph of its own and timed by itself."""
    from triton.testing import do_bench

    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward):
        output = arm.forward()
    with torch.cuda.graph(backward, pool=forward.pool()):
        arm.backward(output)
    return 1e3 * float(sum(do_bench(graph.replay, return_mode="median") for graph in (forward, backward)))


if __name__ == "__main__":
    main()
