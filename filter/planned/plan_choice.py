"""Choose the measured plan that decides: the one that the user gives, or the one whose block is the model's own.

In: the argument `plan`, and what the training does. Out: `ModelPlans`, at once or when a model is looked at.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from fp8gate.filter.contract.plans.plan import Plan, PlanError
from fp8gate.filter.contract.plans.plan_file import Plans, load_plans, require_same_training
from fp8gate.filter.contract.recipes import Variant
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.software_check import stale
from fp8gate.filter.locate.find_plan import FoundPlan, find_plans, is_model_name, plan_files
from fp8gate.filter.planned.incomplete_plan import completing_plan_command, incomplete_remark
from fp8gate.filter.planned.model_plans import ModelPlans
from fp8gate.filter.planned.planning_command import command_again, config_of, planning_command
from fp8gate.filter.policy.findings import Finding, IncompleteTableWarning, PlanMismatchWarning, StaleTableWarning
from fp8gate.filter.policy.settings import FilterSettings

AUTO = "auto"
PlanArgument = Plan | Sequence[Plan] | str | os.PathLike[str] | None
"""A plan or those of a model's kinds of layers, their file, the name of the model that they were measured for, "auto"
for those that fit, None for none."""


class PlanChoice:
    """The plan that decides, and the plans that may turn out to be it.

    chosen: a plan that was given, or that fits the model that `look_at` saw last; None if the table decides all.
    is_auto: `look_at` chooses. candidates: those of this device, recipe, casts and tokens, complete ones first.
    """

    def __init__(
        self,
        plan: PlanArgument,
        *,
        variant: Variant,
        device: str,
        settings: FilterSettings,
        tables: str | os.PathLike[str] | None,
    ) -> None:
        """device: its full name, as its table has it. tables: as in `find_table`.

        Raises PlanError for a plan that is not valid or not for this training, and for a model without such a plan.
        """
        self.is_auto = plan == AUTO
        self.chosen: ModelPlans | None = None
        self.candidates: list[ModelPlans] = []
        self._problems: list[str] = []
        self._has_looked = False
        self._settings = settings
        self._training = _Training(variant, device, settings.tokens // settings.parallel.cp)
        if plan is None:
            return
        if not self.is_auto and not (isinstance(plan, str) and is_model_name(plan)):
            self.chosen = self._given(plan)
            return
        found, self._problems = find_plans(**self._training._asdict(), tables=tables)
        if self.is_auto:
            self.candidates = [self._decisions(one.plans, str(one.file), is_found=True) for one in found]
        else:
            self.chosen = self._named(str(plan), found, tables)

    def look_at(self, shapes: Mapping[str, LinearShape | None], left_alone: Collection[str] | None) -> None:
        """Choose for a model, if nothing was given. shapes: of all its linears, by name. left_alone: see `fits`."""
        self._has_looked = True
        if self.is_auto:
            leaves_out = self._settings.leaves_out
            self.chosen = next((plans for plans in self.candidates if plans.fits(shapes, left_alone, leaves_out)), None)

    def forget(self) -> None:
        """Prepare for another model."""
        self._has_looked = False
        for plan in self.candidates or ([self.chosen] if self.chosen else []):
            plan.forget()
        if self.is_auto:
            self.chosen = None

    def remark(self) -> str | None:
        """Why the table decides, where a plan could; None if a plan decides or none was wanted."""
        if self.chosen or not self.is_auto:
            return None
        if not self._has_looked:
            count = len(self.candidates)
            return f"{count} measured plans may fit: check(model) chooses one" if count else None
        return f"no measured plan fits this model; to measure one: {self.command('CONFIG.json')}"

    def command(self, model: str) -> str:
        """The command that measures a plan for this training. model: a bundled model's name, or a config's path."""
        asked, settings = self._training, self._settings
        recompute = settings.recompute if settings.recompute in ("none", "full") else "none"
        return planning_command(model, asked.variant, tokens=asked.tokens, tp=settings.parallel.tp, recompute=recompute)

    def findings(self) -> Iterator[Finding]:
        """The chosen plan's age, how far it came if it is incomplete, and files that are no valid plans."""
        for problem in self._problems if self._has_looked and self.chosen is None else ():
            yield Finding(PlanMismatchWarning, f"{problem}; this file is left out")
        if self.chosen is None:
            return
        plans, source, of_file = self.chosen.plans, self.chosen.source, self.chosen.of_file
        if differences := stale(plans[0].software):
            again = f"to measure again: {command_again(of_file)}"
            yield Finding(StaleTableWarning, f"{source} was measured with {differences}; {again}")
        if remark := incomplete_remark(plans, source, completing_plan_command(of_file, source)):
            yield Finding(IncompleteTableWarning, remark)

    def _given(self, plan: Plan | Sequence[Plan] | str | os.PathLike[str]) -> ModelPlans:
        loaded, source = load_plans(plan)
        require_same_training(loaded, source, **self._training._asdict())
        return self._decisions(loaded, source)

    def _named(self, model: str, found: list[FoundPlan], tables: str | os.PathLike[str] | None) -> ModelPlans:
        settings = self._settings
        recompute = settings.recompute if isinstance(settings.recompute, str) else None
        for one in found:
            plan = one.plans[0]
            if (plan.model, plan.tp) == (model, settings.parallel.tp) and recompute in (None, plan.recompute):
                return self._decisions(one.plans, str(one.file))
        raise PlanError(self._no_plan(model, tables))

    def _no_plan(self, model: str, tables: str | os.PathLike[str] | None) -> str:
        asked, tp = self._training, self._settings.parallel.tp
        known = ", ".join(file.stem for file in plan_files(tables, device=asked.device)) or "none"
        divided = f", tp {tp}" if tp > 1 else ""
        return (
            f"plan: no plan of {model!r} for {asked.variant} at {asked.tokens} tokens{divided} on {asked.device}; "
            f"plans of this device: {known}. To measure one, run on it: {self.command(config_of(model))}"
        )

    def _decisions(self, plans: Plans, source: str, *, is_found: bool = False) -> ModelPlans:
        return ModelPlans(plans, source, self._settings.recomputes, is_found=is_found)


class _Training(NamedTuple):
    """What a plan must have been measured for. tokens: on one rank."""

    variant: Variant
    device: str
    tokens: int
