"""Find the plans that were measured for a device, recipe and number of tokens.

In: what the training does, a place or None for all of them. Out: plans and their files, the best first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from fp8gate.filter.contract.devices import device_slug
from fp8gate.filter.contract.plans.plan import PLANS, PlanError
from fp8gate.filter.contract.plans.plan_file import Plans, are_complete, read_plans
from fp8gate.filter.contract.recipes import Variant
from fp8gate.filter.locate.places import places

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class FoundPlan(NamedTuple):
    plans: Plans
    file: Path


class FoundPlans(NamedTuple):
    """plans: the complete before the incomplete ones, the newest of each first. problems: a line for each file that
    looks like one of them and is no valid plan.
    """

    plans: list[FoundPlan]
    problems: list[str]


def find_plans(
    *, device: str, variant: Variant, tokens: int, tables: str | os.PathLike[str] | None = None
) -> FoundPlans:
    """The plans of one device, variant and number of tokens on a rank, by the file names that `fp8gate plan` gives.

    device: its full name, as its table has it. tables: as in `find_table`; plans lie in `plans/` beside tables.
    """
    found, problems = [], []
    for path in plan_files(tables, device=device):
        if not re.search(rf"-{variant.recipe}-m{tokens}[.-]", path.name):
            continue
        try:
            plans = read_plans(path)
        except PlanError as error:
            problems.append(str(error))
            continue
        plan = plans[0]
        is_same = (plan.variant, plan.tokens, device_slug(plan.device.name)) == (variant, tokens, device_slug(device))
        found += [FoundPlan(plans, path)] if is_same else []
    return FoundPlans(sorted(found, key=_preference, reverse=True), problems)


def _preference(found: FoundPlan) -> tuple[bool, datetime]:
    return are_complete(found.plans), found.plans[0].measured_at


def plan_files(tables: str | os.PathLike[str] | None = None, *, device: str) -> list[Path]:
    """The files of a device's plans, in the order of `places`. device: its full name."""
    found = [path for folder in _plan_folders(tables, device) for path in sorted(folder.glob("*.yaml"))]
    return [path for path in found if not path.name.startswith(".")]  # a dot: of a plan that is being written


def is_model_name(plan: str) -> bool:
    """Whether the argument `plan` is a model's name, such as "llama3-8b", rather than a plan's file."""
    return bool(_NAME.fullmatch(plan)) and not plan.endswith((".yaml", ".yml")) and not os.path.isfile(plan)


def _plan_folders(tables: str | os.PathLike[str] | None, device: str) -> Iterator[Path]:
    for place in places(tables):
        if not os.path.isdir(place.path):
            yield place.path.parent / PLANS
        elif os.path.isdir(place.path / device_slug(device)):
            yield place.path / device_slug(device) / PLANS
        else:
            yield place.path / PLANS
