"""The options of every command, frozen: scripts that people have written must keep working."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import typer.main
from typer.testing import CliRunner

import fp8gate
from fp8gate.cli import app, options
from fp8gate.cli.options import RecipeOrAll, recipes_of, require
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.recipes import RECIPES

REQUIRED = "required"
OPTIONS = {
    "calibrate": {
        "--grid": "default",
        "--recipes": None,
        "--casts": "inductor",
        "--device": None,
        "--out": None,
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
        "--tables": None,
        "--points": 24,
        "--device": None,
        "--workers": None,
        "--min-speedup": 1.05,
        "--files": False,
        "--json": False,
    },
    "breakdown": {
        "m": REQUIRED,
        "k": REQUIRED,
        "n": REQUIRED,
        "--recipe": REQUIRED,
        "--casts": "inductor",
        "--device": None,
        "--png": None,
        "--json": False,
    },
    "explain": {
        "model": "",
        "--recipe": REQUIRED,
        "--tokens": REQUIRED,
        "--tp": 1,
        "--cp": 1,
        "--recompute": "none",
        "--casts": None,
        "--device": None,
        "--tables": None,
        "--plan": "auto",
        "--filter-fqns": "",
        "--linear": None,
        "--lookup": "interpolate",
        "--min-speedup": None,
        "--strict": False,
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
        "--casts": "inductor",
        "--filter-fqns": "",
        "--exhaustive": False,
        "--device": None,
        "--tables": None,
        "--out": None,
        "--resume / --fresh": True,
        "--stop-after": None,
        "--workers": None,
        "--json": False,
    },
    "doctor": {"--json": False},
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
    assert recipes_of("all", "fp8gate") == ("rowwise",)
    assert recipes_of("rowwise") == ("rowwise",)


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"]])
def test_alone_it_shows_its_help(args):
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")
    assert "--install-completion" in result.stdout
    for command in OPTIONS:
        assert re.search(rf"^  {command} +\S", result.stdout, flags=re.M)
    assert "..." not in result.stdout.partition("Commands:")[2]  # whole sentences


@pytest.mark.parametrize("command", OPTIONS)
def test_every_command_takes_the_short_option_for_help(command):
    short, long = (CliRunner().invoke(app, [command, option]) for option in ("-h", "--help"))
    assert short.exit_code == 0
    assert short.stdout == long.stdout


def test_the_version_is_that_of_the_package():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"fp8gate {fp8gate.__version__}\n")


def test_an_unknown_command_is_a_usage_error():
    assert CliRunner().invoke(app, ["nonsense"]).exit_code == 2


def test_the_shell_completes_commands(monkeypatch):
    monkeypatch.setenv("_FP8GATE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "fp8gate ca")
    monkeypatch.setenv("COMP_CWORD", "1")
    result = CliRunner().invoke(app, [], prog_name="fp8gate")
    assert result.stdout.split() == ["calibrate"]


MEASURING = ["torch", "torchao", "numpy", "pandas", "pynvml"]


@pytest.mark.parametrize(
    ("packages", "missing", "message"),
    [
        (MEASURING, ["torch", "pandas"], "x needs torch, pandas; in a checkout: pip install '.[calibrate]'"),
        (
            [*MEASURING, "transformers"],
            ["transformers"],
            "x needs transformers; in a checkout: pip install '.[models]'",
        ),
        (
            [*MEASURING, "transformers"],
            ["torch", "transformers"],
            "x needs torch, transformers; in a checkout: pip install '.[calibrate,models]'",
        ),
        (["jinja2", "numpy"], ["numpy"], "x needs numpy; in a checkout: pip install '.[report]'"),
    ],
)
def test_what_is_missing_is_named_with_the_extra_that_brings_it(monkeypatch, packages, missing, message):
    monkeypatch.setattr(options, "find_spec", lambda name: None if name in missing else object())
    with pytest.raises(InputError) as error:
        require("x", packages)
    assert str(error.value) == message


def test_nothing_is_said_where_nothing_is_missing(monkeypatch):
    monkeypatch.setattr(options, "find_spec", lambda name: object())
    require("x", MEASURING)
