"""The command that measures a plan again is complete: what it runs writes the same plan."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest
from plans import CANDIDATES, TINY_CONFIG, make_plan
from typer.main import get_command
from typer.testing import CliRunner

from fp8gate.calibrate.device.cpu import Cpu
from fp8gate.calibrate.planning import plan_block, plan_writing
from fp8gate.cli import app
from fp8gate.filter.contract.plans.plan_file import read_plans
from fp8gate.filter.contract.recipes import Variant
from fp8gate.filter.planned.planning_command import command_again, planning_command

TWO_KINDS = {
    **TINY_CONFIG,
    "model_type": "qwen2_moe",
    "num_hidden_layers": 3,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "mlp_only_layers": [0],
}
"""A first layer without experts, and two with them."""
OPTIONS = {
    "model": "CONFIG.json",
    "recipe": "--recipe tensorwise",
    "tokens": "--tokens 64",
    "sequence": "--sequence 16",
    "tp": "--tp 2",
    "recompute": "--recompute full",
    "emulate_precision_casts": "--no-emulate-precision-casts",
    "casts": "--casts fp8gate",
    "filter_fqns": "--filter-fqns k_proj",
    "exhaustive": "--exhaustive",
    "device": "--device cpu",
}
"""Everything that changes what a plan measures."""
OTHERS = {"tables", "out", "resume", "stop_after", "workers", "as_json"}
"""`tables` says where the search starts; the rest are about the run, not about what is measured."""


@pytest.fixture
def write_plan(monkeypatch, tmp_path):
    """Runs a command up to where it would measure, as on a device that compiles. It returns the plans in the file."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(Cpu, "defaults", replace(Cpu.defaults, compiles=True))

    def not_measured(subject, *, recipe, device, protocol, exhaustive, **_):
        setup = plan_block._setup(subject, recipe, device, protocol)
        fixed = {"table": None, "torchao": None, "indivisible": (), "left_alone": (), "convert": ()}
        said = {name: getattr(setup, name) for name in setup.__struct_fields__}
        chosen = {"exhaustive": exhaustive, "left_out": subject.left_out, "layers": subject.layers}
        return make_plan(**fixed, **said, **chosen, candidates=CANDIDATES[:1])

    monkeypatch.setattr(plan_writing, "plan_subject", not_measured)

    def write_plan(command, config=TINY_CONFIG):
        file, out = tmp_path / "tiny" / "config.json", tmp_path / "out"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(config))
        words = [str(file) if word == "CONFIG.json" else word for word in shlex.split(command)[1:]]
        result = CliRunner().invoke(app, [*words, "--workers", "0", "--out", str(out)])
        assert result.exit_code == 0, result.output
        (path,) = out.rglob("*.yaml")
        plans = read_plans(path)
        path.unlink()
        return plans

    return write_plan


def command_of(*options):
    required = [OPTIONS["model"], OPTIONS["tokens"], "--recipe rowwise"]
    return " ".join(["fp8gate plan", *required, *options])


def test_every_option_of_the_command_is_known_here():
    params = {param.name for param in get_command(app).commands["plan"].params}
    assert params - {"help"} == OPTIONS.keys() | OTHERS


@pytest.mark.parametrize(
    "options",
    [
        [],
        *([option] for name, option in OPTIONS.items() if name not in ("model", "tokens")),
        ["--emulate-precision-casts --recipe tensorwise"],
        ["--filter-fqns mlp,q_proj", "--tp 2", "--sequence 32", "--recompute full", "--casts fp8gate", "--exhaustive"],
    ],
    ids=" ".join,
)
def test_running_the_command_makes_the_same_plan(write_plan, options):
    plans = write_plan(command_of(*options))
    again = command_again(plans)
    assert write_plan(again) == plans
    if options:
        assert plans != write_plan(command_of()) or options == ["--device cpu"]  # the CPU is all there is here
        assert again != command_again(write_plan(command_of())) or options == ["--device cpu"]


@pytest.mark.parametrize(
    "pattern", ["k_proj", "layers.0.mlp", "mlp.gate_proj", "layers.0.self_attn,down_proj", "shared_expert"]
)
def test_patterns_leave_out_the_same_roles_of_each_kind_of_layers(write_plan, pattern):
    """Also where two kinds have a role and one of them keeps it."""
    plans = write_plan(command_of(f"--filter-fqns {pattern}"), TWO_KINDS)
    assert len(plans) == 2
    assert any(plan.left_out for plan in plans)
    assert write_plan(command_again(plans), TWO_KINDS) == plans


def test_a_bundled_model_is_named():
    again = command_again((make_plan(model="llama3-8b"),))
    assert again.startswith("fp8gate plan llama3-8b --recipe rowwise --tokens 32 --sequence 32")


def test_a_path_is_quoted():
    command = planning_command("my model/config.json", Variant("rowwise"), tokens=8)
    assert command == "fp8gate plan 'my model/config.json' --recipe rowwise --tokens 8"
