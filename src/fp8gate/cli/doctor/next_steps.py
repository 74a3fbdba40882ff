"""What follows from a checkup: what is to be done, and the commands that do it. Pure."""

from __future__ import annotations

from typing import NamedTuple

from fp8gate.cli.doctor.checkup import Checkup
from fp8gate.cli.doctor.found_files import NO_OUT
from fp8gate.filter.contract.recipes import RECIPES

MOST_STEPS = 3
EXPLAIN = "fp8gate explain llama3-8b --recipe all --tokens 8192"
PLAN = "fp8gate plan llama3-8b --recipe rowwise --tokens 8192"


class Step(NamedTuple):
    """A command, and what it is for."""

    command: str
    why: str


def problems(checkup: Checkup) -> list[str]:
    """What is to be done, in plain words; nothing if all is well."""
    found = [f"{package} is not installed" for package in ("torch", "torchao") if not checkup.versions[package]]
    if checkup.device and not checkup.device.runs_float8:
        found.append(f"float8 does not run on {checkup.device.name}: it needs compute capability 8.9 or higher")
    if checkup.missing:
        found.append(f"no table for this device: {', '.join(checkup.missing)}")
    files = (*checkup.tables, *checkup.plans)
    found += [f"{file.what}: {file.problem}" for file in files if file.problem]
    found += [f"{file.what} was measured with {file.stale}" for file in files if file.stale]
    found += [f"{file.what} is incomplete, with {file.incomplete}" for file in files if file.incomplete]
    found += [f"{journal} waits to be gone on with" for journal in checkup.waiting]
    found += [problem for problem in (checkup.casts_problem, checkup.out_problem) if problem]
    return found


def next_steps(checkup: Checkup) -> list[Step]:
    """One to three commands: first what is to be done, then what is worth trying."""
    device, steps = checkup.device, []
    if not (checkup.versions["torch"] and checkup.versions["torchao"]):
        steps.append(Step("pip install '.[calibrate]'", "to measure, and to convert layers"))
    elif checkup.waiting:
        steps.append(
            Step(
                "fp8gate plan" if "/plans/" in checkup.waiting[0] else "fp8gate calibrate",
                "with the same options: it goes on",
            )
        )
    elif commands := list(dict.fromkeys(table.completed_by for table in checkup.tables if table.completed_by)):
        steps.append(Step(commands[0], "with the same options: it goes on, and completes the tables"))
    elif checkup.missing or any(table.problem and not table.is_misfiled for table in checkup.tables):
        steps.append(_calibrate(checkup))
    elif command := next((plan.completed_by for plan in checkup.plans if plan.completed_by), None):
        steps.append(Step(command, "with the same options: it goes on, and completes the plan"))
    if verify := next((table.verified_by for table in checkup.tables if table.verified_by), None):
        steps.append(Step(verify, "whether the tables still hold with this software"))
    if again := [plan.measured_again_by for plan in checkup.plans if plan.measured_again_by]:
        steps.append(Step(again[0], "measures a stale plan again"))
    if checkup.measured_gpu and (device is None or device.kind == "cpu"):
        steps.append(Step(f"{EXPLAIN} --device {checkup.measured_gpu}", "what a measured GPU would convert"))
    elif checkup.tables:
        if device and device.kind != "cpu" and not checkup.plans:
            steps.append(Step(PLAN + _out(checkup), "which sets win inside a block of your model"))
        steps.append(Step(EXPLAIN, "which layers of a model to convert"))
    return steps[:MOST_STEPS]


def _calibrate(checkup: Checkup) -> Step:
    some = "" if len(checkup.missing) in (0, len(RECIPES)) else f" --recipes {','.join(checkup.missing)}"
    quick = " --grid quick" if checkup.device and checkup.device.kind == "cpu" else ""
    return Step(f"fp8gate calibrate{some}{quick}{_out(checkup)}", "measures this device and writes its tables")


def _out(checkup: Checkup) -> str:
    return "" if checkup.out else NO_OUT
