"""The options of every command, frozen: scripts that people have written must keep working."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import typer.main

from fp8gate.cli import app
from fp8gate.cli.options import RecipeOrAll, recipes_of
from fp8gate.filter.contract.recipes import RECIPES

REQUIRED = "required"
THRESHOLDS = Path("thresholds")
OPTIONS = {
    "calibrate": {
        "--grid": "default",
        "--recipes": "tensorwise,rowwise,rowwise_with_gw_hp",
        "--device": None,
        "--out": THRESHOLDS,
        "--resume / --fresh": True,
        "--model": None,
        "--tokens": None,
        "--tp": 1,
        "--stop-after": None,
        "--workers": None,
        "--seed": 0,
        "--json": False,
    },
    "merge": {"tables": REQUIRED, "--out": REQUIRED, "--json": False},
    "diff": {"before": REQUIRED, "after": REQUIRED, "--min-speedup": 1.05, "--markdown": False, "--json": False},
    "report": {"tables": REQUIRED, "--out": Path("report")},
    "verify": {
        "--tables": THRESHOLDS,
        "--points": 24,
        "--device": None,
        "--workers": None,
        "--min-speedup": 1.05,
        "--json": False,
    },
    "breakdown": {
        "m": REQUIRED,
        "k": REQUIRED,
        "n": REQUIRED,
        "--recipe": REQUIRED,
        "--device": None,
        "--png": None,
        "--json": False,
    },
    "explain": {
        "model": REQUIRED,
        "--recipe": REQUIRED,
        "--tokens": REQUIRED,
        "--tp": 1,
        "--cp": 1,
        "--recompute": "none",
        "--device": None,
        "--tables": None,
        "--lookup": "interpolate",
        "--min-speedup": 1.05,
        "--json": False,
    },
    "plan": {
        "model": REQUIRED,
        "--recipe": REQUIRED,
        "--tokens": REQUIRED,
        "--sequence": None,
        "--tp": 1,
        "--recompute": "none",
        "--emulate-precision-casts / --no-emulate-precision-casts": None,
        "--exhaustive": False,
        "--device": None,
        "--tables": None,
        "--out": THRESHOLDS,
        "--resume / --fresh": True,
        "--stop-after": None,
        "--workers": None,
        "--json": False,
    },
}


def default(param):
    return REQUIRED if param.required else param.default


def test_names_and_defaults_are_these():
    commands = typer.main.get_command(app).commands
    found = {
        name: {" / ".join([*param.opts, *param.secondary_opts]): default(param) for param in command.params}
        for name, command in commands.items()
    }
    assert found == OPTIONS
    assert {name: list(options) for name, options in found.items()} == {k: list(v) for k, v in OPTIONS.items()}
    assert list(found) == list(OPTIONS)


def test_a_recipe_is_one_of_the_registry_or_all():
    assert get_args(RecipeOrAll) == (*RECIPES, "all")
    assert recipes_of("all") == tuple(RECIPES)
    assert recipes_of("rowwise") == ("rowwise",)
