"""The README tells the truth: its snippets run, its commands parse, its outputs are what the commands print."""

from __future__ import annotations

import re
import shlex
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import nn
from torchao.float8.float8_linear import Float8Linear
from typer.main import get_command
from typer.testing import CliRunner

from fp8gate import StaleTableWarning
from fp8gate.cli import app
from fp8gate.filter.contract import find_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.S)
COMMANDS = [
    line[2:] for block in re.findall(r"```console\n(.*?)```", README, flags=re.S) for line in block.splitlines()
]


@pytest.fixture(autouse=True)
def on_an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find_table, "local_device_name", lambda: "NVIDIA H200")


def marked(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, flags=re.S)
    assert found, name
    return found[1].replace("```\n", "")


@pytest.mark.filterwarnings(f"ignore::{StaleTableWarning.__module__}.StaleTableWarning")
def test_the_torchao_snippet_converts_only_the_winner(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.ModuleDict(
        {"w1": nn.Linear(4096, 14336, bias=False, device="meta"), "wk": nn.Linear(4096, 1024, device="meta")}
    )
    exec(SNIPPETS[0], {"model": model})
    assert isinstance(model["w1"], Float8Linear)
    assert not isinstance(model["wk"], Float8Linear)
    assert "converted 1 of 2 linears" in capsys.readouterr().out


@dataclass
class LinearConfig:
    in_features: int
    out_features: int


class Converter:
    """torchtitan's interface: a nested Config that builds its class, and a filter on linear configs."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        _owner: ClassVar[type]
        recipe_name: str = "rowwise"
        filter_fqns: list[str] = field(default_factory=list)

        def build(self) -> Converter:
            converter: Converter = self._owner(config=self)
            return converter

    def __init_subclass__(cls) -> None:
        if "Config" in cls.__dict__:
            cls.Config._owner = cls

    def __init__(self, config: Config) -> None:
        self.filter_fn = lambda config, fqn: True

    def convert(self, configs: Configs) -> list[str]:
        return [fqn for fqn, config in configs.items() if self.filter_fn(config, fqn)]


Converter.Config._owner = Converter


class Configs(dict[str, LinearConfig]):
    """torchtitan's config tree, flat."""

    def traverse(self, cls: type) -> Iterator[tuple[str, LinearConfig, None, str]]:
        assert cls is LinearConfig
        yield from ((fqn, config, None, fqn) for fqn, config in self.items())


@pytest.mark.filterwarnings(f"ignore::{StaleTableWarning.__module__}.StaleTableWarning")
def test_the_torchtitan_snippet_converts_only_the_winner(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = types.ModuleType("torchtitan.components.quantization.float8")
    module.Float8LinearConverter = Converter  # type: ignore[attr-defined]
    linear = types.ModuleType("torchtitan.models.common.linear")
    linear.Linear = types.SimpleNamespace(Config=LinearConfig)  # type: ignore[attr-defined]
    parents = ("", ".components", ".components.quantization", ".models", ".models.common")
    for name in (f"torchtitan{parent}" for parent in parents):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for leaf in (module, linear):
        monkeypatch.setitem(sys.modules, leaf.__name__, leaf)
    namespace: dict[str, Any] = {}
    exec(SNIPPETS[1], namespace)
    configs = Configs(w1=LinearConfig(4096, 14336), wk=LinearConfig(4096, 1024), lm_head=LinearConfig(4096, 128256))
    converter = namespace["GatedFloat8Converter"].Config(tokens=8192, filter_fqns=["lm_head"]).build()
    assert converter.convert(configs) == ["w1"]
    assert "converted 1 of 3 linears" in capsys.readouterr().out


@pytest.mark.parametrize(("model", "name"), [("llama3-8b", "explain"), ("llama3-70b", "explain-tp")])
def test_the_explain_output_is_what_the_command_prints(model: str, name: str) -> None:
    command = next(c for c in COMMANDS if c.startswith(f"fp8gate explain {model}"))
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0
    assert result.output == marked(name)


@pytest.mark.filterwarnings(f"ignore::{StaleTableWarning.__module__}.StaleTableWarning")
def test_the_parallel_snippet_refuses_what_loses_on_a_rank() -> None:
    namespace: dict[str, Any] = {}
    exec(SNIPPETS[2], namespace)
    wants_float8 = namespace["wants_float8"]
    assert not wants_float8(LinearConfig(8192, 8192), "layers.3.attention.wq")
    decision = wants_float8.decisions["layers.3.attention.wq"]
    assert (decision.m, decision.k, decision.n) == (4096, 8192, 1024)


@pytest.mark.filterwarnings(f"ignore::{StaleTableWarning.__module__}.StaleTableWarning")
def test_the_comparison_is_what_the_benchmark_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from against_torchao_rule import compare

    assert compare("NVIDIA H200") + "\n" == marked("against_torchao_rule")


def test_the_gains_of_plans_are_what_the_benchmark_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from plan_choices import gains, packaged_plans

    assert gains(list(packaged_plans("NVIDIA H200"))) + "\n" == marked("plan_choices")


def test_the_end_to_end_table_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from train_llama_output import headline

    files = sorted((ROOT / "benchmarks" / "data" / "train-llama").glob("*.jsonl"))
    assert headline(files) + "\n" == marked("train_llama")


def test_the_row_shown_is_in_the_committed_table() -> None:
    row = re.search(r"^  - \[8192, 4096, 1024, .*\]$", README, flags=re.M)
    assert row
    assert row[0] in (ROOT / "thresholds" / "nvidia-h200" / "rowwise.yaml").read_text().splitlines()


@pytest.mark.parametrize("command", [c for c in COMMANDS if "ARGS=" in c])
def test_the_arguments_passed_through_make_are_options(command: str) -> None:
    arguments = shlex.split(next(word for word in shlex.split(command) if word.startswith("ARGS="))[5:])
    calibrate = get_command(app).commands["calibrate"]  # type: ignore[attr-defined]
    calibrate.make_context("calibrate", arguments)


def test_every_make_target_shown_exists() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    shown = {shlex.split(c)[1] for c in COMMANDS if c.startswith("make ")}
    assert shown == {"calibrate", "test", "verify"}
    assert shown <= targets
