"""`fp8gate plan`: measure sets of linears inside a model's compiled decoder layer, and write the plan.

Try it: fp8gate plan llama3-8b --recipe rowwise --tokens 8192
"""

from __future__ import annotations

from typing import Annotated

import typer

from fp8gate.cli.options import (
    MEASURING_PACKAGES,
    CastsOption,
    DeviceOption,
    FilterFqnsOption,
    JsonOption,
    ModelArgument,
    OutOption,
    RecipeOrAll,
    Recompute,
    ResumeOption,
    TablesOption,
    TokensOption,
    WorkersOption,
    patterns_of,
    print_json,
    recipes_of,
    require,
    start_measuring,
)
from fp8gate.filter.contract.plans.plan import Plan
from fp8gate.filter.contract.recipes import Variant
from fp8gate.filter.locate.places import default_out

PLANNING_PACKAGES = (*MEASURING_PACKAGES, "transformers")


def plan_command(
    model: ModelArgument,
    recipe: Annotated[RecipeOrAll, typer.Option(help="The float8 recipe, or all, one after the other.")],
    tokens: TokensOption,
    sequence: Annotated[
        int | None, typer.Option(min=1, help="Tokens of one sequence; by default as many as the model takes.")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallel degree: the block is what one rank holds.")] = 1,
    recompute: Annotated[Recompute, typer.Option(help="full: the block is under activation checkpointing.")] = "none",
    emulate_precision_casts: Annotated[
        bool | None,
        typer.Option(help="Inductor's setting for float8 sets; by default as torchtitan sets it: for rowwise only."),
    ] = None,
    casts: CastsOption = "inductor",
    filter_fqns: FilterFqnsOption = "",
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Measure every set of roles.")] = False,
    device: DeviceOption = None,
    tables: TablesOption = None,
    out: OutOption = None,
    resume: ResumeOption = True,
    stop_after: Annotated[
        float | None,
        typer.Option(min=0, help="Minutes for a recipe. One that needs more ends the command; run again, it goes on."),
    ] = None,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure which linears to convert inside a model's compiled decoder layer, and write the plan.

    Casts fuse with their neighbours, so that sets of linears are not worth the sum of their parts: a plan measures
    sets, starting from the table's answer. Every visit is kept in a journal: after Ctrl-C, a kill or --stop-after, the
    same command goes on where it was. Stopped before its end, it writes a plan of what there is, marked as incomplete,
    which the filter takes and names; it never replaces a complete one.
    """
    require("plan", PLANNING_PACKAGES)
    start_measuring(device, workers)
    from fp8gate.calibrate.device.registry import choose_device
    from fp8gate.calibrate.planning.plan_protocol import make_protocol
    from fp8gate.calibrate.planning.plan_writing import plan_model
    from fp8gate.calibrate.planning.subject import model_subjects, plan_path
    from fp8gate.calibrate.report.plan_text import plan_json, plan_text

    subjects, problems = model_subjects(
        model,
        tokens=tokens,
        sequence=sequence,
        tp=tp,
        recomputed=recompute == "full",
        filter_fqns=tuple(patterns_of(filter_fqns)),
    )
    for problem in problems:
        typer.echo(f"warning: not planned: {problem}", err=True)
    torch_device = choose_device(device)
    plans: list[Plan] = []
    for name in recipes_of(recipe, casts):
        protocol = make_protocol(torch_device, name, emulate_precision_casts, casts)
        path = plan_path(out or default_out(), subjects, Variant(name, casts), torch_device, emulate_precision_casts)
        plans += plan_model(
            subjects,
            path,
            recipe=name,
            device=torch_device,
            protocol=protocol,
            tables=tables,
            exhaustive=exhaustive,
            workers=workers,
            fresh=not resume,
            stop_after_s=None if stop_after is None else stop_after * 60,
            say=lambda message: typer.echo(message, err=True),
            shows_bar=True,
        )
    if as_json:
        print_json({"plans": [plan_json(plan) for plan in plans]})
    else:
        typer.echo("\n\n".join(map(plan_text, plans)))
