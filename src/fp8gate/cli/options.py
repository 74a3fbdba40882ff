"""What several commands share: options that mean the same in each, the check for optional packages, JSON output."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.recipes import Casts, Recipe, recipes_with
from fp8gate.filter.contract.software_check import installed_version
from fp8gate.filter.contract.table import DeviceKindName
from fp8gate.filter.locate.places import ENVIRONMENT
from fp8gate.filter.model.model_config import BUNDLED

BUNDLED_MODELS = ", ".join(BUNDLED)
MEASURING_PACKAGES = ("torch", "torchao", "numpy", "pandas", "pynvml")

RecipeOrAll = Literal[Recipe, "all"]
Recompute = Literal["none", "full"]

CastsOption = Annotated[
    Casts,
    typer.Option("--casts", help="Who compiles the casts of rowwise: Inductor, or fp8gate's pass (fp8gate.casts)."),
]
DeviceOption = Annotated[
    DeviceKindName | None, typer.Option("--device", help="What to measure; by default the GPU if there is one.")
]
FilterFqnsOption = Annotated[
    str,
    typer.Option("--filter-fqns", help="Leave linears in bf16 whose name contains one of these, separated by commas."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
LinearOption = Annotated[
    list[str] | None,
    typer.Option("--linear", help="Instead of a config: NAME,IN_FEATURES,OUT_FEATURES,COUNT[,ROWS]; may be repeated."),
]
MinSpeedupOption = Annotated[float, typer.Option("--min-speedup", help="Convert a linear from this speedup on.")]
ModelArgument = Annotated[str, typer.Argument(help=f"A Hugging Face config.json, its folder, or {BUNDLED_MODELS}.")]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Folder of device folders; by default where the filter looks: a checkout's thresholds/, or your own.",
    ),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume/--fresh", help="Go on with an earlier run's journal, or put it aside.")
]
TablesOption = Annotated[
    Path | None,
    typer.Option("--tables", help=f"A table, a device's folder, or a folder of these; instead of {ENVIRONMENT}."),
]
TokensOption = Annotated[
    int, typer.Option("--tokens", min=1, help="Tokens per data parallel rank and microbatch: batch x sequence.")
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers", min=0, help="Processes that compile; with 0 this one does. By default on a GPU: all cores but two."
    ),
]


def recipes_of(choice: RecipeOrAll, casts: Casts = "inductor") -> tuple[Recipe, ...]:
    """One recipe, or every one that can have these casts."""
    return recipes_with(casts) if choice == "all" else (choice,)


def patterns_of(names: str) -> list[str]:
    """ "lm_head, mlp" -> ["lm_head", "mlp"]."""
    return [stripped for name in names.split(",") if (stripped := name.strip())]


def require(command: str, packages: Sequence[str] = MEASURING_PACKAGES) -> None:
    """Raise InputError if a package is missing; the message says which of fp8gate's extras bring it."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise InputError(
            f"{command} needs {', '.join(missing)}; in a checkout: pip install '.[{_extras(missing, packages)}]'"
        )


def _extras(missing: Sequence[str], packages: Sequence[str]) -> str:
    """The extras of pyproject.toml that bring what is missing of the packages of a command."""
    base = "calibrate" if "torch" in packages else "report"
    extras = [base] if set(missing) - {"transformers"} else []
    return ",".join([*extras, *(["models"] if "transformers" in missing else [])])


def start_measuring(device: DeviceKindName | None, workers: int | None) -> None:
    """Make the folder for temporary files, and start the process that workers are forked from.

    That process imports torch while this one does. Before that, say if this torch is newer than all that were tested.
    """
    say_if_untested()
    from fp8gate.calibrate.processes.forkserver import start_early
    from fp8gate.calibrate.processes.run_folder import use_run_folder

    use_run_folder()
    if workers != 0:
        start_early(device)


def say_if_untested() -> None:
    """Say on standard error that this torch is newer than all that were tested. Of several ranks, the first says it."""
    from fp8gate.calibrate.device.torch_release import untested

    doubt = untested(installed_version("torch"))
    if doubt and os.environ.get("RANK", "0") == "0":
        typer.echo(doubt, err=True)


def print_json(data: dict[str, Any]) -> None:
    typer.echo(json.dumps(data, indent=2))
