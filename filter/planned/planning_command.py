"""The `fp8gate plan` command that measures a plan: one for a training, or one that is there, again. Pure.

In: what the training does, or the plans of a file. Out: a command for a shell.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import Literal

from fp8gate.filter.contract.plans.plan import Plan
from fp8gate.filter.contract.plans.plan_file import Plans
from fp8gate.filter.contract.recipes import RECIPES, Variant
from fp8gate.filter.contract.table import DeviceKindName
from fp8gate.filter.model.model_config import BUNDLED

PRECISION_CASTS = "emulate_precision_casts"


def command_again(plans: Plans) -> str:
    """The command that measures the plans of a file again: its options are all those that change what they measure."""
    plan = plans[0]
    return planning_command(
        config_of(plan.model),
        plan.variant,
        tokens=plan.tokens,
        sequence=next((one.sequence for one in plans if one.sequence), None),
        tp=plan.tp,
        recompute=plan.recompute,
        emulate_precision_casts=_precision_casts(plan),
        filter_fqns=tuple(dict.fromkeys(_patterns(plans))),
        exhaustive=plan.exhaustive,
        device=plan.device.kind,
    )


def config_of(model: str) -> str:
    """What `fp8gate plan` takes for a model of this name: plans do not say where the config was of one not bundled."""
    return model if model in BUNDLED.names else "CONFIG.json"


def planning_command(
    model: str,
    variant: Variant,
    *,
    tokens: int,
    sequence: int | None = None,
    tp: int = 1,
    recompute: Literal["none", "full"] = "none",
    emulate_precision_casts: bool | None = None,
    filter_fqns: Sequence[str] = (),
    exhaustive: bool = False,
    device: DeviceKindName = "cuda",
) -> str:
    """The command with these options, but for those that are the default on a machine with a GPU."""
    words = ["fp8gate", "plan", model, "--recipe", variant.recipe, "--tokens", f"{tokens}"]
    words += ["--sequence", f"{sequence}"] if sequence else []
    words += ["--tp", f"{tp}"] if tp > 1 else []
    words += ["--recompute", recompute] if recompute != "none" else []
    if emulate_precision_casts is not None:
        words.append("--emulate-precision-casts" if emulate_precision_casts else "--no-emulate-precision-casts")
    words += variant.option.split()
    words += ["--filter-fqns", ",".join(filter_fqns)] if filter_fqns else []
    words += ["--exhaustive"] if exhaustive else []
    words += ["--device", device] if device != "cuda" else []
    return shlex.join(words)


def _precision_casts(plan: Plan) -> bool | None:
    """The setting that was asked for; None for the recipe's own, and where nothing is compiled."""
    used = plan.protocol.inductor.get(PRECISION_CASTS, False)
    is_own = used == RECIPES[plan.recipe].inductor.get(PRECISION_CASTS, False)
    return None if is_own or not plan.protocol.compile else used


def _patterns(plans: Plans) -> Iterator[str]:
    """Parts of names that only the linears have that were left out.

    The last part of a role where that tells them apart, as the rest lacks the indices that names have. The whole name
    where another kind of layers keeps the role: then this kind has one layer, as a pattern fits all layers of a kind.
    """
    kept = [f"{plan.layers}.{role}" for plan in plans for role in plan.shapes if role not in plan.left_out]
    for plan in plans:
        for role in plan.left_out:
            parts = (role.rpartition(".")[2], role, f"{plan.layers}.{role}")
            yield next((part for part in parts if not any(part in name for name in kept)), role)
