"""The command line: `fp8gate calibrate` measures, `verify` measures some of it again, `merge` joins tables, `diff`
compares them, `report` draws them, `breakdown` takes one linear apart, `explain` asks a table about a model, `plan`
measures sets of linears in a model's own block.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from fp8gate.filter.contract.find_table import ENVIRONMENT, find_table
from fp8gate.filter.contract.plan import write_plan
from fp8gate.filter.contract.recipes import RECIPES, Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import read_table, write_table
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP
from fp8gate.filter.decision.lookup import DEFAULT_LOOKUP, Lookup, LookupName
from fp8gate.filter.explain.explanation import Explanation, explain
from fp8gate.filter.explain.explanation_text import explanation_json, explanation_text, recipes_json, recipes_text
from fp8gate.filter.model.model_config import BUNDLED, linear_roles, load_model, role_shape
from fp8gate.filter.model.parallel import Parallel, Shards

if TYPE_CHECKING:
    from fp8gate.calibrate.sweep.run_sweep import SweepResult

EXIT_STOPPED, EXIT_FINDINGS, EXIT_USAGE, EXIT_INTERRUPTED = 1, 1, 2, 130
MEASURING, DRAWING = ("torch", "torchao", "numpy", "pandas", "pynvml"), ("jinja2", "matplotlib", "numpy", "PIL")
PLANNING = (*MEASURING, "transformers")


class Commands(TyperGroup):
    """All commands, which Ctrl-C ends with one exit code, whatever typer's release makes of it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("fp8gate: stopped", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    help=(
        "Measure where float8 linears train faster than bf16 on this GPU, and convert only those.\n\n"
        "Exit codes: 0 fine; 1 findings, or stopped before the end; 2 usage or bad input; 130 Ctrl-C."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DeviceKind = Literal["cuda", "cpu"]
RecipeOrAll = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp", "all"]


@app.command("calibrate")
def calibrate_command(
    grid: Annotated[
        str, typer.Option(help="quick, default, or a YAML file with m, k, n lists and shapes.")
    ] = "default",
    recipes: Annotated[str, typer.Option(help="Recipes to measure, separated by commas.")] = ",".join(RECIPES),
    device: Annotated[
        DeviceKind | None, typer.Option(help="What to measure; by default the GPU if there is one.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for <device>/<recipe>.yaml and the journal.")] = Path("thresholds"),
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on with an earlier sweep's journal, or put it aside.")
    ] = True,
    model: Annotated[
        str | None, typer.Option(help=f"Add this model's shapes: a config.json or {', '.join(BUNDLED)}.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per microbatch, for --model.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallel degree, for --model: its local shapes.")] = 1,
    stop_after: Annotated[
        float | None,
        typer.Option(min=0, help="Minutes; then stop, to go on when run again (for job time limits)."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that compile; 0 for none but this. On a GPU: all cores but two."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of points, the repeated ones, and the data.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Measure this device and write its tables.

    Every point is kept in a journal beside the tables as soon as it is measured: after Ctrl-C, a kill or
    --stop-after, the same command goes on where it was. Tables are written when all points are measured. Exit code 1
    if points remain, or if no table was written as bf16 differed from itself.
    """
    _require("calibrate")
    if (model is None) != (tokens is None):
        _fail("--model and --tokens go together: a linear's shape depends on both")
    if tp > 1 and model is None:
        _fail("--tp: expected a --model whose shapes it divides; a grid's shapes are a rank's already")
    try:
        chosen = _parse_recipes(recipes)
        extra = _model_shapes(model, tokens, tp) if model and tokens else []
        result = _run_sweep(grid, chosen, device, out, not resume, extra, stop_after, workers, seed)
    except (ValueError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        typer.echo("stopped; what was measured is in the journal: run the same command to go on", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if result is None:
        return
    if as_json:
        from fp8gate.calibrate.report.sweep_text import sweep_json

        typer.echo(_json(sweep_json(result)))
    else:
        _print_result(result)
    if result.remaining or result.off:
        raise typer.Exit(EXIT_STOPPED)


@app.command("merge")
def merge_command(
    tables: Annotated[list[Path], typer.Argument(help="Tables of one recipe, device, software and protocol.")],
    out: Annotated[Path, typer.Option(help="File to write; none of the tables.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Make one table of several: sweeps of several days, or of a job array.

    Points that several tables have are combined by their bounds, which widen where the tables disagree. The order of
    the tables does not matter. What differs in recipe, device, software or protocol is refused. Merge what was
    measured, not what was merged before: a table that goes in twice counts twice.
    """
    from fp8gate.calibrate.sweep.merge import merge_tables

    if out.resolve() in [path.resolve() for path in tables]:
        _fail(f"--out: expected another file than the tables, which would count again next time; got {out}")
    try:
        merged = merge_tables({str(path): read_table(path) for path in tables})
        write_table(merged, out)
    except (ValueError, OSError) as error:
        _fail(str(error))
    if as_json:
        typer.echo(_json({"table": str(out), "points": len(merged.points), "tables": len(tables)}))
    else:
        typer.echo(f"wrote {out}: {len(merged.points)} points of {len(tables)} tables")


@app.command("diff")
def diff_command(
    before: Annotated[Path, typer.Argument(help="A table, or a folder of tables such as thresholds/nvidia-h200.")],
    after: Annotated[Path, typer.Argument(help="The same, measured later, elsewhere or with other software.")],
    min_speedup: Annotated[float, typer.Option(help="Decisions: convert from this speedup on.")] = DEFAULT_MIN_SPEEDUP,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Say what changed between two tables, and what it means for models.

    Exit code 1 if points changed by more than two honest sweeps do, if all have shifted, or if numbers were lost; 0 if
    not; 2 if something cannot be read.
    """
    from fp8gate.calibrate.comparison.diff import compare_paths
    from fp8gate.calibrate.report.comparison_text import comparison_json, comparison_text

    try:
        comparisons = compare_paths(before, after, min_speedup=min_speedup)
    except ValueError as error:
        _fail(str(error))
    if as_json:
        typer.echo(_json({"comparisons": [comparison_json(comparison) for comparison in comparisons]}))
    else:
        typer.echo(comparison_text(comparisons, "markdown" if markdown else "text"))
    if any(comparison.has_findings for comparison in comparisons):
        raise typer.Exit(EXIT_FINDINGS)


@app.command("report")
def report_command(
    tables: Annotated[list[Path], typer.Argument(help="Tables, or folders of tables such as thresholds/nvidia-h200.")],
    out: Annotated[Path, typer.Option(help="Folder for index.html and its pictures.")] = Path("report"),
) -> None:
    """Draw tables: one HTML page to look at, question and pass on, and its pictures as PNG files.

    For each device: maps of the speedup over k and n for each recipe and number of tokens, where float8 begins to win,
    where torchao's fixed rule begins to convert, which points are ambiguous or have no number, where the layers of
    the bundled models lie, what measured it all, and how far the numbers can be trusted. Recipes of one device stand
    side by side: give all its tables at once. The page needs no network and nothing beside it, and follows the
    browser's dark or light mode; so do the pictures, which come in both. Needs no GPU.

    For example: fp8gate report thresholds/nvidia-h200 --out report

    Exit code 2 if a table cannot be read, if two are of one device and recipe, or if --out cannot be written.
    """
    _require("report", DRAWING)
    from fp8gate.calibrate.report.page import write_report

    try:
        written = write_report(tables, out)
    except (ValueError, OSError) as error:
        _fail(str(error))
    for path in written:
        typer.echo(f"wrote {path}")


@app.command("verify")
def verify_command(
    tables: Annotated[Path, typer.Option(help="Folder of tables.")] = Path("thresholds"),
    points: Annotated[int, typer.Option(min=8, help="How many of their points to measure again.")] = 24,
    device: Annotated[
        DeviceKind | None, typer.Option(help="What to measure; by default the GPU if there is one.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that compile; 0 for none but this.")] = None,
    min_speedup: Annotated[float, typer.Option(help="Decisions: convert from this speedup on.")] = DEFAULT_MIN_SPEEDUP,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Measure a sample of the committed tables again and say whether they still hold here.

    Every table under the folder is read and checked. Those of this device are measured again at some points, spread
    over all sizes; if there are none, only the files are checked. Exit code 1 if they do not hold, or if the device
    cannot be measured.
    """
    _require("verify")
    from fp8gate.calibrate.processes.forkserver import start_early

    if device != "cpu" and workers != 0:
        start_early()
    from fp8gate.calibrate.comparison.verify import verify
    from fp8gate.calibrate.device.description import choose_device
    from fp8gate.calibrate.points.measure_point import DeviceLostError
    from fp8gate.calibrate.report.comparison_text import verification_json, verification_text

    try:
        found = verify(tables, choose_device(device), points=points, min_speedup=min_speedup, workers=workers)
    except (ValueError, OSError) as error:
        _fail(str(error))
    except DeviceLostError as error:
        typer.echo(f"fp8gate: the GPU failed at {error.args[0].shape}: {error.__cause__}", err=True)
        raise typer.Exit(EXIT_STOPPED) from error
    except RuntimeError as error:  # the processes that measure, or a device that is not what it was
        typer.echo(f"fp8gate: {error}", err=True)
        raise typer.Exit(EXIT_STOPPED) from error
    typer.echo(_json(verification_json(found)) if as_json else verification_text(found))
    if found.has_findings:
        raise typer.Exit(EXIT_FINDINGS)


@app.command("breakdown")
def breakdown_command(
    m: Annotated[int, typer.Argument(min=1, help="Tokens: the rows of the input.")],
    k: Annotated[int, typer.Argument(min=1, help="in_features.")],
    n: Annotated[int, typer.Argument(min=1, help="out_features.")],
    recipe: Annotated[Recipe, typer.Option(help="The float8 recipe to set against bf16.")],
    device: Annotated[
        DeviceKind | None, typer.Option(help="What to measure; by default the GPU if there is one.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Write a picture to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Say where the time of one linear goes, kernel by kernel, and so why float8 wins or loses.

    The kernels are those of the graphs that a sweep times, by torch.profiler; on a CPU, the ops of eager calls. Exit
    code 1 if they do not sum to the paired timing within 5 %.
    """
    _require("breakdown")
    from fp8gate.calibrate.breakdown.take_apart import break_down
    from fp8gate.calibrate.device.description import choose_device
    from fp8gate.calibrate.report.breakdown_text import breakdown_json, breakdown_text, write_png

    try:
        found = break_down(LinearShape(m, k, n), recipe, choose_device(device))
        typer.echo(_json(breakdown_json(found)) if as_json else breakdown_text(found))
        if png:
            write_png(found, png)
    except (ValueError, OSError) as error:
        _fail(str(error))
    except RuntimeError as error:
        typer.echo(f"fp8gate: {error}", err=True)
        raise typer.Exit(EXIT_STOPPED) from error
    if found.has_findings:
        raise typer.Exit(EXIT_FINDINGS)


@app.command("explain")
def explain_command(
    model: Annotated[str, typer.Argument(help=f"A Hugging Face config.json, or {', '.join(BUNDLED)}.")],
    recipe: Annotated[RecipeOrAll, typer.Option(help="The float8 recipe, or all to compare them.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per data parallel rank and microbatch: batch x sequence.")],
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallel degree, which must divide every layer.")] = 1,
    cp: Annotated[int, typer.Option(min=1, help="Context parallel degree, which divides the tokens.")] = 1,
    recompute: Annotated[
        Literal["none", "full"], typer.Option(help="full: activation checkpointing runs the blocks' forwards twice.")
    ] = "none",
    device: Annotated[
        str | None,
        typer.Option(help="Device name, such as 'NVIDIA H200'; by default the one here (asks torch)."),
    ] = None,
    tables: Annotated[
        Path | None,
        typer.Option(help=f"A table or folder of tables, before {ENVIRONMENT} and the packaged ones."),
    ] = None,
    lookup: Annotated[
        LookupName, typer.Option(help="Between the measured points around, or the nearest one.")
    ] = DEFAULT_LOOKUP,
    min_speedup: Annotated[float, typer.Option(help="Convert from this speedup on.")] = DEFAULT_MIN_SPEEDUP,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Say which linears of a model would be converted, why, and what it is worth. Needs no GPU."""
    if not min_speedup > 0:
        _fail(f"--min-speedup: expected a ratio above 0, such as {DEFAULT_MIN_SPEEDUP}; got {min_speedup}")
    asked = {"model": model, "tokens": tokens, "tp": tp, "cp": cp, "recompute": recompute}
    explanations: dict[Recipe, Explanation] = {}
    try:
        config, shards = load_model(model), _shards(tokens, tp, cp)
        for one in RECIPES if recipe == "all" else (recipe,):
            table, _ = find_table(one, device=device, tables=tables)
            explanations[one] = explain(
                config,
                table,
                Lookup(table, lookup),
                shards=shards,
                recomputed=recompute == "full",
                min_speedup=min_speedup,
            )
    except ValueError as error:
        _fail(str(error))
    title = _title(asked)
    if recipe == "all":
        typer.echo(_json(recipes_json(asked, explanations)) if as_json else recipes_text(title, explanations))
    else:
        explanation = explanations[recipe]
        typer.echo(_json(explanation_json(asked, explanation)) if as_json else explanation_text(title, explanation))


@app.command("plan")
def plan_command(
    model: Annotated[str, typer.Argument(help=f"A Hugging Face config.json, or {', '.join(BUNDLED)}.")],
    recipe: Annotated[RecipeOrAll, typer.Option(help="The float8 recipe, or all, one after the other.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per data parallel rank and microbatch: batch x sequence.")],
    sequence: Annotated[
        int | None, typer.Option(min=1, help="Tokens of one sequence; by default as many as the model takes.")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallel degree: the block is what one rank holds.")] = 1,
    recompute: Annotated[
        Literal["none", "full"], typer.Option(help="full: the block is under activation checkpointing.")
    ] = "none",
    emulate_precision_casts: Annotated[
        bool | None,
        typer.Option(help="Inductor's setting for float8 sets; by default as torchtitan has it: for rowwise alone."),
    ] = None,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Measure every set of roles.")] = False,
    device: Annotated[
        DeviceKind | None, typer.Option(help="What to measure; by default the GPU if there is one.")
    ] = None,
    tables: Annotated[
        Path | None,
        typer.Option(help=f"A table or folder of tables, before {ENVIRONMENT} and the packaged ones."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for <device>/plans/ and its journals.")] = Path("thresholds"),
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on with an earlier run's journal, or put it aside.")
    ] = True,
    stop_after: Annotated[
        float | None, typer.Option(min=0, help="Minutes a recipe; then stop, to go on when run again.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that compile; 0 for none but this. On a GPU: all cores but two."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Measure which linears to convert inside a model's compiled decoder layer, and write the plan.

    Casts fuse with their neighbours, so that sets of linears are not worth the sum of their parts: a plan measures
    sets, starting from the table's answer. Every visit is kept in a journal: after Ctrl-C, a kill or --stop-after, the
    same command goes on where it was.
    """
    _require("plan", PLANNING)
    from fp8gate.calibrate.processes.forkserver import start_early

    if device != "cpu" and workers != 0:
        start_early()
    from fp8gate.calibrate.device.description import choose_device
    from fp8gate.calibrate.planning.block_worker_pool import BlockWorkerDiedError
    from fp8gate.calibrate.planning.plan_block import make_protocol, model_subject, plan_path, plan_subject
    from fp8gate.calibrate.planning.visit_rounds import StoppedError
    from fp8gate.calibrate.report.plan_text import plan_json, plan_text

    plans = {}
    try:
        subject = model_subject(model, tokens=tokens, sequence=sequence, tp=tp, recomputed=recompute == "full")
        for one in RECIPES if recipe == "all" else (recipe,):
            where, setting = choose_device(device), emulate_precision_casts
            path = plan_path(out, subject, one, where, setting)
            plans[path] = plan_subject(
                subject,
                recipe=one,
                device=where,
                protocol=make_protocol(where, one, setting),
                tables=tables,
                exhaustive=exhaustive,
                workers=workers,
                out=path.parent,
                fresh=not resume,
                stop_after_s=None if stop_after is None else stop_after * 60,
                say=lambda message: typer.echo(message, err=True),
            )
            write_plan(plans[path], path)
            typer.echo(f"wrote {path}", err=True)
    except (StoppedError, BlockWorkerDiedError) as error:
        typer.echo(f"fp8gate: {error.args[0]}; run the same command to go on", err=True)
        raise typer.Exit(EXIT_STOPPED) from error
    except RuntimeError as error:
        typer.echo(f"fp8gate: the device failed: {error}; run the same command to go on", err=True)
        raise typer.Exit(EXIT_STOPPED) from error
    except (ValueError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        typer.echo("stopped; what was measured is in the journal: run the same command to go on", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if as_json:
        typer.echo(_json({"plans": [plan_json(plan) for plan in plans.values()]}))
    else:
        typer.echo("\n\n".join(map(plan_text, plans.values())))


def _run_sweep(
    grid_name: str,
    recipes: tuple[Recipe, ...],
    kind: DeviceKind | None,
    out: Path,
    fresh: bool,
    extra: list[LinearShape],
    stop_after_min: float | None,
    workers: int | None,
    seed: int,
) -> SweepResult | None:
    """None on a rank that only takes part: rank 0 has the result."""
    from fp8gate.calibrate.processes.forkserver import start_early
    from fp8gate.calibrate.ranks.environment import RankEnvironment, claim_gpu

    place = RankEnvironment.from_environment()
    if place and kind != "cpu":
        claim_gpu(place)
    if kind != "cpu" and workers != 0:
        start_early()
    from fp8gate.calibrate.device.description import choose_device
    from fp8gate.calibrate.points.measure_point import DeviceLostError
    from fp8gate.calibrate.points.worker_pool import WorkersDiedError
    from fp8gate.calibrate.ranks.rank_store import RanksError
    from fp8gate.calibrate.ranks.rank_sweep import join, leading, take_part
    from fp8gate.calibrate.sweep.grid import grid_shapes, load_grid
    from fp8gate.calibrate.sweep.run_sweep import make_setup, sweep

    device = choose_device(kind)
    setup = make_setup(device)
    try:
        ranks = join(place) if place else None
        if ranks and ranks.place.rank > 0:
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
                workers=workers,
                seed=seed,
                ranks=ranks,
            )
    except (WorkersDiedError, RanksError) as error:
        typer.echo(f"fp8gate: {error}", err=True)
        raise typer.Exit(EXIT_STOPPED) from error
    except DeviceLostError as error:
        typer.echo(f"fp8gate: the GPU failed at {error.args[0].shape}: {error.__cause__}", err=True)
        typer.echo("what was measured is in the journal: run the same command to go on", err=True)
        raise typer.Exit(EXIT_STOPPED) from error


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
        typer.echo(f"{result.remaining} points remain: run the same command to go on; no table was written")
    for shape, error in result.off.items():
        typer.echo(f"{shape}: bf16 against itself was {error:.1%} off, {MAX_RETRIES + 1} times: no table was written")


def _parse_recipes(names: str) -> tuple[Recipe, ...]:
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in RECIPES:
            raise ValueError(f"--recipes: expected some of {', '.join(RECIPES)}; got {name!r}")
    return tuple(recipe for recipe in RECIPES if recipe in chosen)


def _model_shapes(model: str, tokens: int, tp: int) -> list[LinearShape]:
    """The model's local shapes that float8 can compute; says which it cannot."""
    shapes, shards = [], _shards(tokens, tp, cp=1)
    for linear in linear_roles(load_model(model)):
        shape = role_shape(linear, shards)
        if problem := shape.indivisible():
            typer.echo(f"{linear.fqn} {shape} is not measured: {problem} is no multiple of 16", err=True)
        else:
            shapes.append(shape)
    return shapes


def _shards(tokens: int, tp: int, cp: int) -> Shards:
    """Of the bundled models' names."""
    return Shards(Parallel(tp=tp, cp=cp, plan="transformers"), tokens)


def _title(asked: dict[str, Any]) -> str:
    """ "llama3-70b, 8192 tokens, tp 8": what is not the default."""
    parts = [asked["model"], f"{asked['tokens']} tokens"]
    parts += [f"{name} {asked[name]}" for name in ("tp", "cp") if asked[name] > 1]
    return ", ".join(parts if asked["recompute"] == "none" else [*parts, "recomputed"])


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2)


def _require(command: str, names: Sequence[str] = MEASURING) -> None:
    """What measuring and drawing need, and explaining does not."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        extras = "calibrate,models" if "transformers" in names else "calibrate"
        _fail(f"{command} needs {', '.join(missing)}: pip install 'fp8gate[{extras}]'")


def _fail(message: str) -> NoReturn:
    typer.echo(f"fp8gate: {message}", err=True)
    raise typer.Exit(EXIT_USAGE)
