"""How a block is planned: the protocol of its visits, and how many processes fit on the device.

In: a device, a recipe. Out: a `PlanProtocol`, a number of workers.
"""

from __future__ import annotations

import torch

from fp8gate.calibrate.arms.block import DATA
from fp8gate.calibrate.arms.blueprint import Blueprint
from fp8gate.calibrate.arms.linear import inductor_settings
from fp8gate.calibrate.device.capacity import default_workers
from fp8gate.calibrate.device.registry import KINDS, kind_of, require_compiler
from fp8gate.filter.contract.plans.plan import PlanProtocol
from fp8gate.filter.contract.recipes import Casts, Recipe, require_casts
from fp8gate.filter.contract.table import Device

SCREENING, FINAL, CONFIDENCE = 2, 6, 0.95  # 6 visits are the fewest that give these bounds
COPIES, MAX_DEVICE_SHARE = 3, 0.8
"""A process holds about COPIES times the bf16 operands of a block: weights, their gradients twice (once to compare
with), activations, and what is left of warming up. With what a worker needs anyway, that is 7.0 GiB for llama3-8b's
block of 8192 tokens; 16 processes held 100 GiB (H200, 2026-11-25)."""
MOST_EXPERTS = 8  # that a token is sent to, in usual models


def make_protocol(
    device: torch.device,
    recipe: Recipe,
    emulate_precision_casts: bool | None = None,
    casts: Casts = "inductor",
) -> PlanProtocol:
    """Compiled under CUDA graphs on a GPU, eager on a CPU.

    emulate_precision_casts: Inductor's setting; None: as production has it for the recipe. casts: who compiles those of
    float8. Raises InputError if either is asked for where nothing is compiled, or for casts that are not the recipe's.
    """
    defaults = kind_of(device).defaults
    require_casts(recipe, casts)
    if emulate_precision_casts is not None:
        require_compiler(device, "emulate_precision_casts")
    if casts != "inductor":
        require_compiler(device, "casts")
    return PlanProtocol(
        timer=defaults.timer,
        compile=defaults.compiles,
        inductor=inductor_settings(recipe, emulate_precision_casts) if defaults.compiles else {},
        casts=casts,
        l2="cold",
        data=DATA,
        settle_s=defaults.visit_settle_s,
        run_s=defaults.visit_run_s,
        pause_s=defaults.visit_pause_s,
        screening=SCREENING,
        final=FINAL,
        confidence=CONFIDENCE,
        noise=defaults.visit_noise,
        seed=0,
    )


def useful_block_workers(blueprint: Blueprint, device: Device, protocol: PlanProtocol) -> int:
    """As many as fit on the machine and in the device's memory: each holds a block, its gradients and activations.

    0 where nothing is compiled: workers exist to compile while another process measures.
    """
    if not protocol.compile:
        return 0
    elements = sum(parameter.numel() for parameter in blueprint.template.parameters())
    elements += sum(shape.m * (shape.k + shape.n) for shape in blueprint.shapes.values())
    tokens = max(shape.m for shape in blueprint.shapes.values())
    for one in blueprint.template.parameters():
        if one.ndim == 3:  # grouped experts
            elements += tokens * min(one.shape[0], MOST_EXPERTS) * (one.shape[1] + one.shape[2])
    needed_gib = KINDS[device.kind].defaults.worker_gib + COPIES * 2 * elements / 2**30
    return max(1, min(default_workers(device), int(MAX_DEVICE_SHARE * device.memory_gib / needed_gib)))
