"""What several commands share: options that mean the same in each, the check for optional packages, JSON output."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.find_table import ENVIRONMENT
from fp8gate.filter.contract.recipes import RECIPES, Recipe
from fp8gate.filter.contract.table import DeviceKindName
from fp8gate.filter.model.model_config import BUNDLED

BUNDLED_MODELS = ", ".join(BUNDLED)
MEASURING_PACKAGES = ("torch", "torchao", "numpy", "pandas", "pynvml")

RecipeOrAll = Literal[Recipe, "all"]
Recompute = Literal["none", "full"]

DeviceOption = Annotated[
    DeviceKindName | None, typer.Option("--device", help="What to measure; by default the GPU if there is one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
MinSpeedupOption = Annotated[float, typer.Option("--min-speedup", help="Convert a linear from this speedup on.")]
ModelArgument = Annotated[str, typer.Argument(help=f"A Hugging Face config.json, or {BUNDLED_MODELS}.")]
ResumeOption = Annotated[
    bool, typer.Option("--resume/--fresh", help="Go on with an earlier run's journal, or put it aside.")
]
TablesOption = Annotated[
    Path | None,
    typer.Option("--tables", help=f"A table or folder of tables, before {ENVIRONMENT} and the packaged ones."),
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


def recipes_of(choice: RecipeOrAll) -> tuple[Recipe, ...]:
    """One recipe, or every one."""
    return tuple(RECIPES) if choice == "all" else (choice,)


def require(command: str, packages: Sequence[str] = MEASURING_PACKAGES) -> None:
    """Raise InputError if a package is missing; the message says what to install."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        extras = "calibrate,models" if "transformers" in packages else "calibrate"
        raise InputError(f"{command} needs {', '.join(missing)}: pip install 'fp8gate[{extras}]'")


def start_measuring(device: DeviceKindName | None, workers: int | None) -> None:
    """Make the folder for temporary files, and start the process that workers are forked from.

    That process imports torch while this one does.
    """
    from fp8gate.calibrate.processes.forkserver import start_early
    from fp8gate.calibrate.processes.run_folder import use_run_folder

    use_run_folder()
    if workers != 0:
        start_early(device)


def print_json(data: dict[str, Any]) -> None:
    typer.echo(json.dumps(data, indent=2))
