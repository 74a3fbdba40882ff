"""What benchmarks/train_llama.py trains: the linears that each choice converts, and a run for each set of them.

In: a Llama on the meta device, the command's arguments. Out: `Run`s.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from train_llama_output import Run

from fp8gate import TableError, auto_filter, casts
from fp8gate.calibrate.device.registry import describe_device
from fp8gate.filter.contract.devices import device_slug
from fp8gate.filter.contract.plans.plan import PLANS
from fp8gate.filter.contract.recipes import Variant
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.decision.torchao_rule import torchao_converts
from fp8gate.filter.locate.places import packaged_thresholds
from fp8gate.filter.model.linear_layer import linears_of

MODEL, HEAD = "llama3-8b", "lm_head"
CHOICES = {"all": "all float8", "rule": "torchao's rule", "table": "table", "plan": "plan"}
"""What a run of it is called, for each choice beside bf16."""
OTHER_WEIGHTS = (1, 2)  # seeds for bf16 alone: all choices start from the weights of seed 0


def choices(whole: nn.Module, arguments: argparse.Namespace, device: torch.device) -> dict[str, tuple[str, ...]]:
    """The names of the model's linears that each choice converts. Prints which choices are left out, and why."""
    recipe = arguments.recipe
    found = {"bf16": (), "all float8": everything(whole, arguments)}
    rule = {
        fqn: torchao_converts(recipe, in_features=shape.k, out_features=shape.n)
        for fqn, shape in shapes(whole, arguments).items()
    }
    if None in rule.values():
        say(f"torchao's rule: none for {recipe}, left out")
    else:
        found["torchao's rule"] = tuple(fqn for fqn, converts in rule.items() if converts)
    found |= filter_choices(whole, arguments, device, Variant(recipe), arguments.plan)
    return asked(found, arguments)


def asked(found: dict[str, tuple[str, ...]], arguments: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """bf16, and the choices that were asked for."""
    names = {"bf16", *(CHOICES[choice] for choice in arguments.choices)}
    return {name: float8 for name, float8 in found.items() if name in names}


def casts_choices(whole: nn.Module, arguments: argparse.Namespace, device: torch.device) -> dict[str, tuple[str, ...]]:
    """The same for the choices that are also trained with fp8gate's casts."""
    variant = Variant(arguments.recipe, "fp8gate")
    found = {"all float8": everything(whole, arguments)}
    try:
        with casts.replaced():
            found |= filter_choices(whole, arguments, device, variant, arguments.casts_plan)
    except TableError as error:
        say(f"table, fp8gate's casts: left out: {error}")
    return asked(found, arguments)


def everything(whole: nn.Module, arguments: argparse.Namespace) -> tuple[str, ...]:
    """All that can be converted."""
    return tuple(fqn for fqn, shape in shapes(whole, arguments).items() if not shape.indivisible())


def shapes(whole: nn.Module, arguments: argparse.Namespace) -> dict[str, LinearShape]:
    left_out = () if arguments.convert_head else (HEAD,)
    return {
        fqn: LinearShape(arguments.tokens, linear.in_features, linear.out_features)
        for fqn, linear in linears_of(whole)
        if fqn not in left_out
    }


def filter_choices(
    whole: nn.Module, arguments: argparse.Namespace, device: torch.device, variant: Variant, plan: Path | None
) -> dict[str, tuple[str, ...]]:
    """What fp8gate converts by a table and by a plan. plan: one that was given."""
    found = {}
    for name, chosen in {"table": None, "plan": plan or packaged_plan(variant, arguments.tokens, device)}.items():
        if name == "plan" and chosen is None:
            say(f"plan: none given and none in fp8gate, left out{variant.option}")
            continue
        wants = auto_filter(
            variant.recipe,
            casts=variant.casts,
            tokens=arguments.tokens,
            filter_fqns=() if arguments.convert_head else (HEAD,),
            tables=arguments.tables,
            plan=chosen,
        )
        wants.check(whole)
        say(f"{name}: {wants.summary()}")
        found[name] = tuple(fqn for fqn, decision in wants.decisions.items() if decision.convert)
    return found


def packaged_plan(variant: Variant, tokens: int, device: torch.device) -> Path | None:
    folder = packaged_thresholds() / device_slug(describe_device(device).name) / PLANS
    path = folder / f"{MODEL}-{variant.recipe}-m{tokens}{variant.suffix}.yaml"
    return path if path.is_file() else None


def runs_of(found: Mapping[str, tuple[str, ...]], with_casts: Mapping[str, tuple[str, ...]]) -> tuple[Run, ...]:
    """A run for each set of linears, beginning with bf16; then with fp8gate's casts; then bf16 from other weights.

    A choice with fp8gate's casts that converts nothing is no run: bf16 has no casts.
    """
    runs = [Run(name=", ".join(same), float8=float8) for float8, same in by_set(found).items()]
    runs += [
        Run(name=f"{', '.join(same)}; fp8gate's casts", float8=float8, casts="fp8gate")
        for float8, same in by_set(with_casts).items()
        if float8
    ]
    others = [Run(name=f"bf16, weights {seed}", float8=(), weights=seed) for seed in OTHER_WEIGHTS]
    return (*runs, *others)


def by_set(found: Mapping[str, tuple[str, ...]]) -> dict[tuple[str, ...], list[str]]:
    """The choices that convert each set of linears."""
    names: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, float8 in found.items():
        names[float8].append(name)
    return names


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
