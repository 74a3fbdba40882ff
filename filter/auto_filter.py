"""`auto_filter`: makes a filter from a table, the tokens per microbatch, and how the model is divided and recomputed.

Try it: python -c "from fp8gate import auto_filter; print(auto_filter('rowwise', tokens=8192, device='NVIDIA H200'))"
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from fp8gate.casts import enable_if_asked
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.recipes import RECIPES, Casts, Recipe, Variant, require_casts
from fp8gate.filter.contract.software_check import stale
from fp8gate.filter.decision.lookup import DEFAULT_LOOKUP, LookupName
from fp8gate.filter.decision.measured_settings import casts_wanted, unmeasured_settings
from fp8gate.filter.layer_filter import AutoFilter
from fp8gate.filter.locate.find_table import find_table
from fp8gate.filter.locate.incomplete_table import complete_table_elsewhere, incomplete_remark
from fp8gate.filter.model.parallel import Parallel
from fp8gate.filter.planned.plan_choice import AUTO, PlanArgument, PlanChoice
from fp8gate.filter.policy.findings import (
    Finding,
    Findings,
    IncompleteTableWarning,
    Policy,
    StaleTableWarning,
    UnmeasuredSettingWarning,
)
from fp8gate.filter.policy.settings import NOT_PARALLEL, FilterSettings, Recompute, policies


def auto_filter(
    recipe: Recipe,
    *,
    tokens: int,
    rows: Mapping[str, int] | None = None,
    float8_config: object = None,
    compiled: bool = True,
    casts: Casts | None = None,
    device: str | None = None,
    filter_fqns: Sequence[str] = (),
    min_speedup: float | None = None,
    lookup: LookupName = DEFAULT_LOOKUP,
    tables: str | os.PathLike[str] | None = None,
    plan: PlanArgument = AUTO,
    parallel: Parallel = NOT_PARALLEL,
    recompute: Recompute = "none",
    strict: bool = False,
    on_stale: Policy | None = None,
    on_incomplete: Policy | None = None,
    on_outside: Policy | None = None,
    on_ambiguous: Policy | None = None,
    on_missing: Policy | None = None,
    on_unknown_shard: Policy | None = None,
    on_unknown_rows: Policy | None = None,
    on_not_plain: Policy | None = None,
    on_unmeasured: Policy | None = None,
    on_plan: Policy | None = None,
    on_unmatched: Policy | None = None,
    on_nothing: Policy | None = None,
) -> AutoFilter:
    """A `module_filter_fn` for torchao's `convert_to_float8_training`, and a `filter_fn` for torchtitan.

    recipe: the float8 recipe trained with. tokens: rows of each linear's input per microbatch (batch x sequence), as
    one data parallel rank has them, before context parallelism divides them. rows: for linears that multiply another
    number: pattern of names -> rows, such as {"*.experts.*": 256}; of several that match, the last counts.
    float8_config: torchao's Float8LinearConfig, if you have one: settings in it that were not measured are found.
    compiled: whether training runs under torch.compile, as what was measured did. casts: who compiles the casts of
    rowwise: "inductor", or "fp8gate" where `fp8gate.casts` is on; None asks which they are. The table and the plans are
    those measured with these casts. Whatever this is, FP8GATE_CASTS=1 in the environment turns fp8gate's casts on.

    device: a measured device as people write it, such as "H200"; None asks torch for the local one. filter_fqns:
    linears whose name contains one of these are never converted. lookup: "interpolate" between the measured points
    around a shape, or take the "nearest" one. tables: a thresholds folder, a device's folder or a table file; None
    searches FP8GATE_THRESHOLDS, or the checkout, the user's folder and the package. parallel: how tensor and context
    parallelism divide the model; a weight that is already divided (a DTensor) is taken as it is. recompute: the layers
    under activation checkpointing, whose forward runs twice: "none", "full", or a predicate of their names.

    min_speedup: convert every linear from this measured bf16 / float8 time ratio on. None: from 1.05 on, and from 1.0
    where linears share their input; but tensorwise leaves value projections in bf16 that share it with query and key.
    `check` sees what is shared if it gets example inputs. Else names tell: q_proj, k_proj, v_proj; gate_proj, up_proj;
    and as others spell them.

    plan: "auto" lets `check(model)` look for a measured plan among those of this device, recipe and number of tokens:
    one whose roles, local shapes and recomputation are those of the model's blocks. Without `check`, or if none fits,
    the table decides. Otherwise it is a plan, its file, the name of the model that it was measured for ("llama3-8b"),
    or None to do without. A plan decides the roles that it knows, whatever min_speedup is, and the table decides the
    other linears. If a block cannot convert all of the plan's set, it takes what was measured of the rest of the set,
    or the table's answers. Without `check`, a plan that is given takes every block for a whole one.

    on_stale and the other policies: "ignore", "warn" of or raise ("error") the category that `POLICY_OF` names. None
    raises if `strict`, else warns. `auto_filter` itself gives the StaleTableWarning, the
    IncompleteTableWarning and the UnmeasuredSettingWarning. Only `check` gives an UnmatchedPatternWarning, a
    NothingConvertedWarning and what a plan's blocks convert together; any question gives the others.

    Raises InputError (a ValueError) for arguments out of range, TableError (an InputError) if there is no valid table
    for the device, recipe and casts, and PlanError (an InputError) for a plan that is not valid or not for this device,
    recipe, casts and tokens.
    """
    if recipe not in RECIPES:
        raise InputError(f"recipe: expected one of {', '.join(RECIPES)}; got {recipe!r}")
    if isinstance(filter_fqns, str):
        raise InputError(f"filter_fqns: expected a list of strings; got the string {filter_fqns!r}")
    settings = FilterSettings(
        tokens=tokens,
        rows=dict(rows or {}),
        filter_fqns=tuple(filter_fqns),
        min_speedup=min_speedup,
        lookup=lookup,
        parallel=parallel,
        recompute=recompute,
    )
    asked = {
        "on_stale": on_stale,
        "on_incomplete": on_incomplete,
        "on_outside": on_outside,
        "on_ambiguous": on_ambiguous,
        "on_missing": on_missing,
        "on_unknown_shard": on_unknown_shard,
        "on_unknown_rows": on_unknown_rows,
        "on_not_plain": on_not_plain,
        "on_unmeasured": on_unmeasured,
        "on_plan": on_plan,
        "on_unmatched": on_unmatched,
        "on_nothing": on_nothing,
    }
    findings = Findings(policies("error" if strict else "warn", asked))
    variant, is_default = Variant(recipe, casts_wanted(recipe) if casts is None else casts), casts is None
    wants_float8 = make_filter(
        variant, settings, findings, device=device, tables=tables, plan=plan, has_default_casts=is_default
    )
    enable_if_asked()  # not before there is a table for them
    for message in unmeasured_settings(recipe, float8_config, compiled=compiled):
        findings.add(Finding(UnmeasuredSettingWarning, message))
    wants_float8.compare_casts()
    findings.settle()
    return wants_float8


def make_filter(
    variant: Variant,
    settings: FilterSettings,
    findings: Findings,
    *,
    device: str | None = None,
    tables: str | os.PathLike[str] | None = None,
    plan: PlanArgument = AUTO,
    has_default_casts: bool = False,
) -> AutoFilter:
    """The filter of a training that may run elsewhere: nothing is asked of this process, nor turned on in it.

    The arguments and errors are those of `auto_filter`. has_default_casts: see `AutoFilter`. What is found is added to
    `findings`, and not settled.
    """
    require_casts(*variant)
    table, path = find_table(variant.recipe, casts=variant.casts, device=device, tables=tables)
    plans = PlanChoice(plan, variant=table.variant, device=table.device.name, settings=settings, tables=tables)
    wants_float8 = AutoFilter(table, path, settings, findings, plans, has_default_casts=has_default_casts)
    if differences := stale(table.software):
        message = f"{path} was measured with {differences}; to measure again: fp8gate calibrate{table.variant.option}"
        findings.add(Finding(StaleTableWarning, message))
    if remark := incomplete_remark(table, path):
        complete = complete_table_elsewhere(path) if tables is None else None
        name = f"; or name the complete one that comes after it, by --tables, or tables= in Python: {complete}"
        instead = name if complete else ""
        findings.add(Finding(IncompleteTableWarning, f"{remark}{instead}"))
    for finding in plans.findings():
        findings.add(finding)
    return wants_float8
