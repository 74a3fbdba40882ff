"""A point that only has to be timed: its linears are compiled, which touches no device.

In: a task, the recipes' protocols. Out: a `ReadyPoint`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fp8gate.calibrate.arms.compilation import ReadyLinear, compiled_linear, eager_linear
from fp8gate.calibrate.arms.failure import Failure
from fp8gate.calibrate.points.point_record import CONTROL, ArmName
from fp8gate.calibrate.points.task_queue import Task
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import SweepProtocol


@dataclass(slots=True)
class ReadyPoint:
    """A point whose linears are compiled, or whose compilation failed."""

    task: Task
    protocols: Mapping[Recipe, SweepProtocol]
    linears: dict[ArmName, ReadyLinear] = field(default_factory=dict)
    failures: dict[ArmName, Failure] = field(default_factory=dict)
    compiling_s: float = 0.0

    @classmethod
    def of_bf16(cls, shape: LinearShape) -> ReadyPoint:
        """bf16 alone, which needs no compilation."""
        return cls(Task(shape), {}, {"bf16": eager_linear(None, shape)})


def make_ready(task: Task, protocols: Mapping[Recipe, SweepProtocol], device: torch.device) -> ReadyPoint:
    """Compile what the task needs; `protocols` are those of its recipes. Runs nothing on the device."""
    start = time.perf_counter()
    torch._dynamo.reset()
    point = ReadyPoint(task, protocols, {"bf16": eager_linear(None, task.shape)})
    if task.control:
        point.linears[CONTROL] = eager_linear(None, task.shape)
    for recipe, protocol in protocols.items():
        try:
            if protocol.compile:
                ready = compiled_linear(recipe, task.shape, protocol.inductor, device.type, protocol.casts)
            else:
                ready = eager_linear(recipe, task.shape)
        except Exception as error:
            point.failures[recipe] = Failure.of(error)
        else:
            point.linears[recipe] = ready
    point.compiling_s = time.perf_counter() - start
    return point
