"""The plan file of a model: each kind of its layers is planned, and what there is of it is written if that ends early.

In: the kinds of a model's layers, a file. Out: the file, complete, or marked as incomplete, which the filter takes and
names.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fp8gate.calibrate.planning.plan_block import plan_subject
from fp8gate.calibrate.planning.subject import Subject
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.plans.plan import Plan, PlanError
from fp8gate.filter.contract.plans.plan_file import Plans, are_complete, read_plans, write_plans
from fp8gate.filter.planned.incomplete_plan import how_far


def plan_model(
    subjects: Sequence[Subject],
    path: Path,
    *,
    fresh: bool = False,
    stop_after_s: float | None = None,
    say: Callable[[str], None] = lambda message: None,
    **options: Any,
) -> Plans:
    """The plans of all kinds of a model's layers, in `path`. Their journals lie beside it.

    stop_after_s: for all of them together. options: of `plan_subject`, which raises. Whatever ends it early, Ctrl-C and
    signals too, what was measured is then in the file, unless that has a complete plan or more visits.
    """
    until = math.inf if stop_after_s is None else time.monotonic() + stop_after_s
    finished: list[Plan] = []
    stopped: list[Plan] = []
    try:
        for subject in subjects:
            left_s = until - time.monotonic()
            of_kind = plan_subject(
                subject,
                out=path.parent,
                fresh=fresh,
                stop_after_s=left_s,
                on_stop=stopped.append,
                say=say,
                **options,
            )
            finished.append(of_kind)
    except BaseException as error:
        if not isinstance(error, InputError):  # after which another command is to be run
            again = "the same command without --fresh" if fresh else "the same command"
            write_incomplete_plans([*finished, *stopped], subjects, path, say, again)
        raise
    write_plans(finished, path)
    say(f"wrote {path}")
    return tuple(finished)


def write_incomplete_plans(
    plans: Sequence[Plan], subjects: Sequence[Subject], path: Path, say: Callable[[str], None], again: str
) -> None:
    """Write what a stopped command has measured; it says what, or why not. again: the command that goes on.

    plans: of the first of the subjects, the last of them perhaps incomplete. A complete file is never replaced, and
    neither is an incomplete one with more visits. That the file cannot be written must not hide why the command ended,
    so it is only said.
    """
    if not plans:
        say("no plan is written: bf16 and another set have not both been visited yet")
        return
    missing = tuple(subject.layers for subject in subjects[len(plans) :])
    there_is = tuple(msgspec.structs.replace(plan, missing=missing) for plan in plans)
    if reason := _why_kept(path, there_is):
        say(f"{path} is kept: {reason}")
        return
    try:
        write_plans(there_is, path)
    except (OSError, PlanError) as error:
        say(f"the incomplete plan cannot be written: {error}")
        return
    say(f"wrote {path}, incomplete, with {how_far(there_is)}: {again} goes on, and completes it")


def _why_kept(path: Path, plans: Plans) -> str | None:
    """Why the file that is there is better than these incomplete plans; None if there is none, or a worse one."""
    if not path.exists():
        return None
    try:
        earlier = read_plans(path)
    except PlanError as error:
        return f"it cannot be read ({error})"
    if are_complete(earlier):
        return "it is complete"
    had, has = (sum(plan.visits for plan in one) for one in (earlier, plans))
    return f"it has {had} visits, this search {has}" if had > has else None
