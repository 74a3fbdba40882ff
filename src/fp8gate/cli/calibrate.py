"""`fp8gate calibrate`: measure this device and write its tables.

Try it: fp8gate calibrate --grid quick --out /tmp/tables
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fp8gate.cli.options import (
    BUNDLED_MODELS,
    CastsOption,
    DeviceOption,
    JsonOption,
    OutOption,
    ResumeOption,
    WorkersOption,
    print_json,
    require,
    start_measuring,
)
from fp8gate.filter.contract.errors import EXIT_FOUND, InputError, UnfinishedError
from fp8gate.filter.contract.recipes import RECIPES, Casts, Recipe, recipes_with, require_casts
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import DeviceKindName
from fp8gate.filter.locate.places import default_out, is_searched
from fp8gate.filter.model.described_model import role_shape
from fp8gate.filter.model.parallel import Parallel, Shards
from fp8gate.filter.observe.describe import describe_model

if TYPE_CHECKING:
    from fp8gate.calibrate.sweep.run_sweep import SweepResult


USUAL_TOKENS = 8192  # in the lines to paste, if they were measured


def calibrate_command(
    grid: Annotated[
        str,
        typer.Option(
            help="quick; default: on one GPU a coarse grid, then the points near which float8 breaks even; full: all; "
            "a YAML file with m, k, n lists and shapes; or a table: its shapes."
        ),
    ] = "default",
    recipes: Annotated[
        str | None, typer.Option(help="Recipes to measure, separated by commas; by default all that have the casts.")
    ] = None,
    casts: CastsOption = "inductor",
    device: DeviceOption = None,
    out: OutOption = None,
    resume: ResumeOption = True,
    model: Annotated[
        str | None, typer.Option(help=f"Add this model's shapes: a config.json or {BUNDLED_MODELS}.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per microbatch, for --model.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallel degree, for --model: its local shapes.")] = 1,
    stop_after: Annotated[
        float | None,
        typer.Option(min=0, help="Minutes; then stop, to go on when run again (for job time limits)."),
    ] = None,
    workers: WorkersOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of points, of which are repeated, and of the data.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure this device and write its tables.

    Every point is kept in a journal beside the tables as soon as it is measured: after Ctrl-C, a kill or
    --stop-after, the same command goes on where it was. Stopped before its end, it writes tables of what there is,
    marked as incomplete, which the filter takes and names; they never replace complete ones. Exit code 1 if points
    remain, if no table was written because bf16 differed from itself, or if too many points are noise.
    """
    require("calibrate")
    chosen, extra = _parse_recipes(recipes, casts), _extra_shapes(model, tokens, tp)
    folder = out or default_out()
    result = _run_sweep(grid, chosen, casts, device, folder, not resume, extra, stop_after, workers, seed)
    if result is None:
        return
    if as_json:
        from fp8gate.calibrate.report.sweep_text import sweep_json

        print_json(sweep_json(result))
    else:
        _print_result(result)
        if result.tables and not result.report.too_noisy:
            typer.echo(_lines_to_paste(result, folder))
    if result.tables and result.report.too_noisy:
        raise UnfinishedError(result.report.too_noisy)
    if result.remaining or result.off:
        raise typer.Exit(EXIT_FOUND)


def _run_sweep(
    grid_name: str,
    recipes: tuple[Recipe, ...],
    casts: Casts,
    kind: DeviceKindName | None,
    out: Path,
    fresh: bool,
    extra: list[LinearShape],
    stop_after_min: float | None,
    workers: int | None,
    seed: int,
) -> SweepResult | None:
    """Measure, alone or together with other ranks. Only rank 0 has the result: the others return None."""
    from fp8gate.calibrate.device.registry import KINDS, asked_kinds, choose_device
    from fp8gate.calibrate.ranks.environment import RankEnvironment

    environment = RankEnvironment.from_environment()
    if environment:  # before torch starts
        for asked in asked_kinds(kind):
            asked.claim(environment.local_rank, environment.local_world)
    start_measuring(kind, workers)
    from fp8gate.calibrate.grid.grid import grid_shapes, load_grid
    from fp8gate.calibrate.points.setup import make_setup
    from fp8gate.calibrate.ranks.rank_sweep import MeasuringByRanks, join, leading, take_part
    from fp8gate.calibrate.sweep.run_sweep import sweep

    device = choose_device(kind)
    setup = make_setup(device, casts)
    ranks = join(environment) if environment else None
    if ranks and ranks.environment.rank > 0:
        take_part(ranks, device, setup, workers)
        return None
    with leading(ranks) if ranks else nullcontext():
        grid, shapes = load_grid(grid_name, setup.device.kind)
        return sweep(
            grid,
            [*grid_shapes(grid), *shapes, *extra],
            recipes=recipes,
            device=device,
            setup=setup,
            out=out,
            fresh=fresh,
            stop_after_s=None if stop_after_min is None else stop_after_min * 60,
            refines=grid_name in KINDS[setup.device.kind].defaults.refined,
            workers=workers,
            seed=seed,
            measuring=MeasuringByRanks(ranks) if ranks else None,
        )


def _print_result(result: SweepResult) -> None:
    from fp8gate.calibrate.points.task_queue import MAX_RETRIES
    from fp8gate.calibrate.report.sweep_text import summarize

    for table in result.tables.values():
        typer.echo(summarize(table) + "\n")
    for path, table in result.tables.items():
        statuses = Counter(point.status for point in table.points)
        typer.echo(f"wrote {path}: {', '.join(f'{count} {status}' for status, count in sorted(statuses.items()))}")
    typer.echo(result.report.text())
    if result.remaining:
        count = len(result.incomplete)
        written = f"{count} incomplete tables were written" if count else "no table was written"
        typer.echo(f"{result.remaining} points remain: run the same command to go on; {written}")
    for shape, error in result.off.items():
        typer.echo(f"{shape}: bf16 against itself was {error:.1%} off, {MAX_RETRIES + 1} times: no table was written")


def _lines_to_paste(result: SweepResult, folder: Path) -> str:
    """What training code has to say to use the tables, which it finds by itself if they lie where it searches."""
    by_recipe = {table.recipe: table for table in result.tables.values()}
    recipe: Recipe = "rowwise" if "rowwise" in by_recipe else next(iter(by_recipe))
    rows = by_recipe[recipe].grid.m or tuple(point.m for point in by_recipe[recipe].points)
    tokens = min(rows, key=lambda m: abs(m - USUAL_TOKENS))
    has_ours = by_recipe[recipe].protocol.casts == "fp8gate"
    place = "" if is_searched(folder) else f", tables={str(folder)!r}"
    return (
        "\nIn training code on this device:\n\n"
        "    from torchao.float8 import Float8LinearConfig, convert_to_float8_training\n"
        f"    from fp8gate import auto_filter{', casts' if has_ours else ''}\n\n"
        f"{'    casts.enable()  # before anything is compiled' + chr(10) if has_ours else ''}"
        f"    wants_float8 = auto_filter({recipe!r}, tokens={tokens}{place})  # batch x sequence of a microbatch\n"
        "    wants_float8.check(model)\n"
        f"    config = Float8LinearConfig.from_recipe_name({recipe!r})\n"
        "    convert_to_float8_training(model, module_filter_fn=wants_float8, config=config)"
    )


def _parse_recipes(names: str | None, casts: Casts) -> tuple[Recipe, ...]:
    if names is None:
        return recipes_with(casts)
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in RECIPES:
            raise InputError(f"--recipes: expected some of {', '.join(RECIPES)}; got {name!r}")
    found = tuple(recipe for recipe in RECIPES if recipe in chosen)
    for recipe in found:
        require_casts(recipe, casts)
    return found


def _extra_shapes(model: str | None, tokens: int | None, tp: int) -> list[LinearShape]:
    """The shapes of --model at --tokens and --tp; none without a model."""
    if model is None and tokens is None:
        if tp > 1:
            raise InputError("--tp: expected a --model whose shapes it divides; a grid's shapes are a rank's already")
        return []
    if model is None or tokens is None:
        raise InputError("--model and --tokens go together: a linear's shape depends on both")
    return model_shapes(model, tokens, tp)


def model_shapes(model: str, tokens: int, tp: int) -> list[LinearShape]:
    """The shapes of one rank's linears. Those that float8 cannot compute are left out and named on standard error."""
    described = describe_model(model, tokens)
    described.require_divisible(tp)
    shapes, shards = [], Shards(Parallel(tp=tp, plan=described.parallel_plan), tokens)
    for linear in described.linears:
        shape = role_shape(linear, shards)
        if problem := shape.indivisible():
            typer.echo(f"{linear.fqn} {shape} is not measured: {problem} is no multiple of 16", err=True)
        else:
            shapes.append(shape)
    return shapes
