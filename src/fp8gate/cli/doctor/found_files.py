"""The tables and plans that the filter would find for a device: what is wrong with them, and the commands that mend it.

In: a device's name. Out: a `FoundFile` for each.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fp8gate.filter.contract.devices import device_slug
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.merged_sweep import measured_text
from fp8gate.filter.contract.plans.plan import PLANS, Plan
from fp8gate.filter.contract.plans.plan_file import Plans, are_complete, read_plans
from fp8gate.filter.contract.recipes import RECIPES, VARIANTS
from fp8gate.filter.contract.software_check import stale
from fp8gate.filter.contract.table import WITH_NUMBERS, Table, read_table
from fp8gate.filter.locate.find_plan import plan_files
from fp8gate.filter.locate.find_table import MisfiledError, NoTableError, find_table, how_to_file
from fp8gate.filter.locate.incomplete_table import completing_command
from fp8gate.filter.locate.places import default_out, packaged_thresholds, places, shown
from fp8gate.filter.planned.incomplete_plan import completing_plan_command, how_far
from fp8gate.filter.planned.planning_command import command_again

NO_OUT = " --out FOLDER"  # where FP8GATE_THRESHOLDS names a table or its folder


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundFile:
    """A table or plan that the filter would use. what: the recipe and casts, of a plan the model too.

    problem: why it cannot. is_misfiled: as it lies where another belongs. incomplete: how far the sweep of a table, or
    the search for a plan, came that was stopped. completed_by: the command that completes it. measured_again_by: the
    command that measures a stale plan again. verified_by: the one that measures points of a stale table again. A file
    has these commands if it is of this device and not misfiled.
    """

    what: str
    path: str
    measured: str = ""
    stale: str | None = None
    incomplete: str | None = None
    completed_by: str | None = None
    measured_again_by: str | None = None
    verified_by: str | None = None
    problem: str | None = None
    is_misfiled: bool = False


def found_tables(device: str) -> Iterator[FoundFile]:
    for variant in VARIANTS:
        try:
            table, path = find_table(variant.recipe, casts=variant.casts)
        except NoTableError:  # the commands to run next say it better
            continue
        except InputError as error:
            yield FoundFile(
                what=str(variant), path="", problem=str(error), is_misfiled=isinstance(error, MisfiledError)
            )
            continue
        numbers = sum(point.status in WITH_NUMBERS for point in table.points)
        measured = f"{numbers} of {len(table.points)} points, {measured_text(table.measured_at, table.merged_from)}"
        differences, is_measurable = stale(table.software), table.device.name == device
        problem = None if numbers else "no point has a number: measure again when nothing else runs here"
        yield FoundFile(
            what=str(variant),
            path=shown(path),
            measured=measured + (", incomplete" if table.incomplete else ""),
            stale=differences,
            incomplete=str(table.incomplete) if table.incomplete else None,
            completed_by=completing_command(table, path) if table.incomplete and is_measurable else None,
            verified_by=_verifying(path) if differences and is_measurable else None,
            problem=problem,
        )


def _verifying(path: Path) -> str:
    """By itself it takes the tables of the first place alone."""
    is_first = path.is_relative_to(places()[0].path)
    return "fp8gate verify" + ("" if is_first else f" --tables {shlex.quote(str(path.parent))}")


def found_plans(device: str) -> Iterator[FoundFile]:
    for path in plan_files(device=device):
        try:
            plans = read_plans(path)
        except InputError as error:
            yield FoundFile(what=path.stem, path=shown(path), problem=str(error))
            continue
        plan, differences, is_complete = plans[0], stale(plans[0].software), are_complete(plans)
        misfiled = _misfiled(path, plans)
        is_measurable = plan.device.name == device and not misfiled
        yield FoundFile(
            what=_training(plans) + (", exhaustive" if plan.exhaustive else ""),
            path=shown(path),
            measured=f"{plan.measured_at:%Y-%m-%d}" + ("" if is_complete else ", incomplete"),
            stale=differences,
            incomplete=None if is_complete else how_far(plans),
            completed_by=_completing(plans, path) if is_measurable and not is_complete else None,
            problem=misfiled,
            is_misfiled=bool(misfiled),
            measured_again_by=_measuring_again(plans, path) if is_measurable and differences else None,
        )


def _completing(plans: Plans, path: Path) -> str:
    command = completing_plan_command(plans, str(path))
    return command if " --out " in command else command + _out_to_name()


def _measuring_again(plans: Plans, path: Path) -> str:
    """In place, except for a packaged plan: the new one is found beside that."""
    is_packaged = path.is_relative_to(packaged_thresholds())
    return command_again(plans) + _out_to_name() if is_packaged else _completing(plans, path)


def _out_to_name() -> str:
    """The option without which nothing could be written, where there is no folder for it by default."""
    return "" if out_folder()[0] else NO_OUT


def _training(plans: Plans) -> str:
    """What tells the plans of a file from others: each setting that is not the default, as in their file's name."""
    plan = plans[0]
    parts = [plan.model, str(plan.variant), f"{plan.tokens} tokens"]
    sequence = next((one.sequence for one in plans if one.sequence), None)
    parts += [f"sequence {sequence}"] if sequence not in (None, plan.tokens) else []
    parts += [f"tp {plan.tp}"] if plan.tp > 1 else []
    left_out = dict.fromkeys(role.rpartition(".")[2] for one in plans for role in one.left_out)
    parts += [f"without {' and '.join(left_out)}"] if left_out else []
    parts += ["recomputed"] if plan.recompute != "none" else []
    used, own = plan.protocol.inductor, RECIPES[plan.recipe].inductor
    settings = sorted(used.keys() | own.keys()) if plan.protocol.compile else []
    differ = [name for name in settings if used.get(name, False) != own.get(name, False)]
    parts += [name if used.get(name, False) else f"no {name}" for name in differ]
    return ", ".join(parts)


def _misfiled(path: Path, plans: Plans) -> str | None:
    """Why the filter does not find plans that are there."""
    plan = plans[0]
    file, part = path.absolute(), f"-{plan.recipe}-m{plan.tokens}"
    folder = file.parents[1]
    if not _is_folder_of(folder, plan):
        folder = folder.with_name(device_slug(plan.device.name))
    belongs = folder / PLANS / (file.name if re.search(rf"{part}[.-]", file.name) else _renamed(file, part))
    if belongs == file:
        return None
    other_name = f"move it there under another name with {part} in it"
    todo = how_to_file(belongs, is_same=_are_of_same(belongs, plans), otherwise=other_name)
    return f"{path}: the filter does not find it there. It belongs in {belongs}{todo}"


def _are_of_same(path: Path, plans: Plans) -> bool:
    """Whether the file has plans of the same model, device and training."""
    try:
        others = read_plans(path)
    except InputError:
        return False
    slugs = {device_slug(one.device.name) for one in (*plans, *others)}
    return _training(others) == _training(plans) and len(slugs) == 1


def _is_folder_of(folder: Path, plan: Plan) -> bool:
    """Whether a device's folder is that of the plan's device. The name of one that is itself a place can be any."""
    slug = device_slug(plan.device.name)
    if folder.name == slug or folder.parent in {place.path.absolute() for place in places()}:
        return folder.name == slug
    return {device_slug(table.device.name) for table in _readable_tables(folder)} <= {slug}


def _readable_tables(folder: Path) -> Iterator[Table]:
    for path in sorted(folder.glob("*.yaml")):
        with contextlib.suppress(InputError):
            yield read_table(path)


def _renamed(file: Path, part: str) -> str:
    """The name of a plan's file with this recipe and number of tokens in it."""
    renamed = re.sub(rf"-({'|'.join(RECIPES)})-m\d+(?=[.-])", part, file.name, count=1)
    return f"{file.stem}{part}{file.suffix}" if renamed == file.name else renamed


def out_folder() -> tuple[Path | None, str | None]:
    """The folder that `calibrate` and `plan` write to, and why they could not."""
    try:
        out = default_out()
    except InputError as error:
        return None, str(error)
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    return out, None if os.access(there, os.W_OK) else f"{there} cannot be written to"
