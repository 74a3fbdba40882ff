"""The end-to-end benchmark: it trains a small model by every choice on the CPU, and reports what it measured."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
import torch
from builders import DEVICE, SOFTWARE_HERE, make_point, make_table, write_file
from plans import make_plan

from fp8gate.filter.contract.plans.plan_file import write_plans
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.model.model_config import BUNDLED

ROOT = Path(__file__).parent.parent
TOKENS, STEPS = 32, 64
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LAYER = "model.layers.0."
TABLE = make_table(
    make_point(TOKENS, 64, 32, 0.5),  # wk, wv
    make_point(TOKENS, 64, 64, 0.9),  # wq, wo
    make_point(TOKENS, 64, 128, 1.5),  # w1, w3
    make_point(TOKENS, 128, 64, 1.2),  # w2
    make_point(TOKENS, 64, 256, 1.5),  # the head
)
MLP = tuple(f"{LAYER}mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
ALL = (*(f"{LAYER}self_attn.{name}" for name in ATTENTION), *MLP)

pytest.importorskip("transformers")


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import train_llama

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small products on a shared machine: threads only wait for each other
    yield train_llama
    torch.set_num_threads(threads)


def bench(llama: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    arguments = ["--tiny", "--layers", 1, "--tokens", TOKENS, "--steps", STEPS, *options]
    monkeypatch.setattr(sys, "argv", ["train_llama.py", *map(str, arguments)])
    llama.main()


def small(llama: ModuleType, layers: int = 1) -> Any:
    return msgspec.structs.replace(BUNDLED["llama3-8b"], **llama.TINY, num_hidden_layers=layers)


def header(llama: ModuleType, *runs: Any) -> Any:
    return llama.Header(
        model="tiny",
        recipe="rowwise",
        layers=1,
        tokens=TOKENS,
        steps=STEPS,
        device=DEVICE,
        software=SOFTWARE_HERE,
        runs=runs,
    )


@pytest.mark.slow
def test_every_choice_trains(
    llama: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_file(TABLE, tmp_path / "rowwise.yaml")
    write_plans([make_plan()], tmp_path / "plan.yaml")
    options = ("--recipe", "rowwise", "--tables", table, "--plan", tmp_path / "plan.yaml", "--out", tmp_path / "out")
    bench(llama, monkeypatch, *options)

    first, *lines = (tmp_path / "out" / "train-llama-rowwise.jsonl").read_bytes().splitlines()
    runs = {run.name: run for run in msgspec.json.decode(first, type=llama.Header).runs}
    assert (
        {name: run.float8 for name, run in runs.items()}
        == {
            "bf16, torchao's rule": (),  # of so small a model it converts nothing
            "all float8": ALL,
            "table": MLP,
            "plan": (ALL[0], *MLP[1:]),  # the table decides what the plan does not know
            "bf16, weights 1": (),
            "bf16, weights 2": (),
        }
    )
    visits = [msgspec.json.decode(line, type=llama.Visit) for line in lines]
    assert sorted((v.run, v.round) for v in visits) == sorted((name, i) for name in runs for i in range(llama.ROUNDS))
    assert {len(visit.losses) for visit in visits} == {STEPS // llama.ROUNDS}

    start = {visit.run: visit.losses[0] for visit in visits if visit.round == 0}
    end = {visit.run: visit.losses[-1] for visit in visits if visit.round == llama.ROUNDS - 1}
    assert all(end[name] < start[name] for name in runs)
    assert 0 < abs(start["all float8"] - start["bf16, torchao's rule"]) < 0.01
    assert len({start[name] for name in runs if not runs[name].float8}) == 3
    out, _ = capsys.readouterr()
    assert [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")] == [
        *("choice", *runs, "loss, steps", *runs)
    ]


def test_what_there_is_not_is_said(
    llama: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_file(msgspec.structs.replace(TABLE, recipe="rowwise_with_gw_hp"), tmp_path / "table.yaml")
    monkeypatch.setattr(llama, "train", lambda *_: [])
    monkeypatch.setattr(llama, "report", lambda header, _: " | ".join(run.name for run in header.runs))
    options = ("--recipe", "rowwise_with_gw_hp", "--tables", table, "--out", tmp_path, "--convert-head")
    bench(llama, monkeypatch, *options)
    out, err = capsys.readouterr()
    assert "torchao's rule: none for rowwise_with_gw_hp, left out" in err
    assert "plan: none given and none in fp8gate, left out" in err
    assert out == "bf16 | all float8 | table | bf16, weights 1 | bf16, weights 2\n"
    first = (tmp_path / "train-llama-rowwise_with_gw_hp.jsonl").read_bytes()
    bench(llama, monkeypatch, *options, "--choices", "table")
    assert capsys.readouterr().out == "bf16 | table | bf16, weights 1 | bf16, weights 2\n"
    assert [run.float8[-1:] for run in msgspec.json.decode(first, type=llama.Header).runs][1:3] == [("lm_head",)] * 2


def test_choices_that_convert_the_same_are_one_model(llama: ModuleType) -> None:
    runs = llama.runs_of(
        {"bf16": (), "all float8": ("a", "b"), "torchao's rule": ("a",), "table": (), "plan": ("a",)}, {}
    )
    assert [(run.name, run.float8, run.weights) for run in runs] == [
        ("bf16, table", (), 0),
        ("all float8", ("a", "b"), 0),
        ("torchao's rule, plan", ("a",), 0),
        ("bf16, weights 1", (), 1),
        ("bf16, weights 2", (), 2),
    ]


def test_what_is_trained_with_fp8gates_casts_is_a_model_of_its_own(llama: ModuleType) -> None:
    everything = ("a", "b")
    with_casts = {"all float8": everything, "table": (), "plan": ("a",)}
    runs = llama.runs_of({"bf16": (), "all float8": everything}, with_casts)
    assert [(run.name, run.float8, run.casts) for run in runs[:-2]] == [
        ("bf16", (), "inductor"),
        ("all float8", ("a", "b"), "inductor"),
        ("all float8; fp8gate's casts", ("a", "b"), "fp8gate"),
        ("plan; fp8gate's casts", ("a",), "fp8gate"),
    ]
    plain, ours = (llama.inductor_of(run, "rowwise") for run in runs[1:3])
    assert plain == RECIPES["rowwise"].inductor  # equal options would let Dynamo run one's code for the other
    assert plain != ours
    assert llama.inductor_of(runs[0], "rowwise") == {}


def test_the_table_of_fp8gates_casts_decides_and_is_left_out_where_it_is_not(
    llama: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llama, "train", lambda *_: [])
    monkeypatch.setattr(llama, "report", lambda header, _: " | ".join(run.name for run in header.runs))
    folder = tmp_path / "nvidia-h200"
    write_file(TABLE, folder / "rowwise.yaml")
    options = ("--recipe", "rowwise", "--tables", folder, "--out", tmp_path / "out", "--casts")
    bench(llama, monkeypatch, *options)
    out, err = capsys.readouterr()
    assert "table, fp8gate's casts: left out: " in err
    assert "all float8; fp8gate's casts | bf16, weights 1" in out
    protocol = msgspec.structs.replace(TABLE.protocol, casts="fp8gate")
    ours = msgspec.structs.replace(TABLE, protocol=protocol)
    write_file(ours, folder / ours.variant.file)
    bench(llama, monkeypatch, *options)
    out, err = capsys.readouterr()
    assert "all float8; fp8gate's casts | table; fp8gate's casts | bf16, weights 1" in out
    assert "to float8 rowwise, fp8gate's casts" in err


def test_getting_ready_trains_nothing_and_a_step_does(llama: ModuleType) -> None:
    training = llama.Training(llama.Run(name="bf16", float8=()), header(llama), small(llama), torch.device("cpu"))
    (ids,) = llama.random_tokens(1, 1, TOKENS, 256)
    weights = [parameter.clone() for parameter in training.model.parameters()]
    at_rest = sum(weight.nbytes for weight in weights) + training.model.model.rotary_emb.inv_freq.nbytes * 2
    training.start(ids)
    assert all(torch.equal(one, other) for one, other in zip(weights, training.model.parameters(), strict=True))
    assert training.resident_bytes() == at_rest
    assert all(parameter.grad is None for parameter in training.model.parameters())
    training.step(ids)
    assert not all(torch.equal(one, other) for one, other in zip(weights, training.model.parameters(), strict=True))
    states = 2 * sum(weight.nbytes for weight in weights) + 4 * len(weights)  # two moments, and a count each
    assert training.resident_bytes() == at_rest + states


def test_layers_and_models_share_one_graph(llama: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two for bf16, one more for the layers with float8, whose settings are the recipe's; the head stays as it is."""
    from torch._dynamo.utils import counters

    compile, asked = torch.compile, []

    @functools.wraps(compile)
    def without_inductor(function: Any, *, options: dict[str, bool], **others: Any) -> Any:
        asked.append(options)
        return compile(function, backend="eager", **others)

    monkeypatch.setattr(torch, "compile", without_inductor)
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    (ids,) = llama.random_tokens(1, 1, TOKENS, 256)
    losses, graphs, both = [], [], (*MLP, *(name.replace(".0.", ".1.") for name in MLP))
    for float8, weights in (((), 0), ((), 1), (both, 0)):
        run = llama.Run(name="", float8=float8, weights=weights)
        training = llama.Training(run, header(llama), small(llama, layers=2), torch.device("cpu"))
        eager = training.loss(ids).item()
        training.compile(RECIPES["rowwise"].inductor if float8 else {})
        training.start(ids)
        losses.append((training.loss(ids).item(), eager))
        graphs.append(counters["stats"]["unique_graphs"] - before)
    torch._dynamo.reset()
    assert graphs == [2, 2, 3]
    assert asked == [{}] * 6 + [{"emulate_precision_casts": True}] * 3
    assert all(one == pytest.approx(other, rel=1e-3) for one, other in losses)


def test_half_of_the_tokens_follow_from_the_one_before(llama: ModuleType) -> None:
    ids = llama.random_tokens(8, 2, 512, 256)
    assert ids.shape == (8, 2, 513)
    assert (ids.min(), ids.max()) == (0, 255)
    assert torch.equal(ids, llama.random_tokens(8, 2, 512, 256))
    pairs = torch.zeros(256, 256, dtype=torch.int64)
    pairs.index_put_((ids[..., :-1].flatten(), ids[..., 1:].flatten()), torch.tensor(1), accumulate=True)
    often = pairs[pairs.sum(1) >= 100]
    shares = often.max(1).values / often.sum(1)
    assert shares.min() > 0.4
    assert shares.mean() == pytest.approx(0.55, abs=0.05)  # chance draws the successor too


def test_too_few_steps_are_refused(
    llama: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps in (100, 24):
        monkeypatch.setattr(sys, "argv", ["", "--recipe", "rowwise", "--out", "x", "--steps", str(steps)])
        with pytest.raises(SystemExit):
            llama.parse()
        assert f"--steps: expected a multiple of 16, at least 64; got {steps}" in capsys.readouterr().err


def made_visits(llama: ModuleType, step_s: dict[str, float], losses: dict[str, float]) -> dict[str, list[Any]]:
    """Losses are 9, but for the last quarter's."""
    return {
        name: [
            llama.Visit(
                run=name,
                round=i,
                step_s=step_s[name],
                losses=(9.0 if i < 12 else losses[name],) * 4,
                peak_gib=12.0 + i,
                sm_clock_mhz=1980,
                slowdown=None,
            )
            for i in range(llama.ROUNDS)
        ]
        for name in step_s
    }


def test_the_report_says_what_was_measured(llama: ModuleType) -> None:
    runs = llama.runs_of({"bf16": (), "torchao's rule": ("a",), "table": ("a",), "plan": ("b", "c")}, {})
    step_s = {"bf16": 0.5, "torchao's rule, table": 0.4, "plan": 0.625, "bf16, weights 1": 0.5, "bf16, weights 2": 0.5}
    losses = {
        "bf16": 5.0,
        "torchao's rule, table": 5.25,
        "plan": 5.375,
        "bf16, weights 1": 4.75,
        "bf16, weights 2": 5.125,
    }
    text = llama.report(header(llama, *runs), made_visits(llama, step_s, losses))
    title, gains, verdict, curves = text.split("\n\n")
    assert title.startswith("tiny, 1 layers, 32 tokens, 64 steps, rowwise, NVIDIA H200 (torch ")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in gains.splitlines()[2:]]
    assert rows == [
        ["bf16", "0", "64", "", "-20.0% (-20.0% to -20.0%)", "27.0", "5.0000"],
        ["torchao's rule, table", "1", "80", "+25.0% (+25.0% to +25.0%)", "", "27.0", "5.2500"],
        ["plan", "2", "51", "-20.0% (-20.0% to -20.0%)", "-36.0% (-36.0% to -36.0%)", "27.0", "5.3750"],
        ["bf16, weights 1", "0", "64", "+0.0% (+0.0% to +0.0%)", "-20.0% (-20.0% to -20.0%)", "27.0", "4.7500"],
        ["bf16, weights 2", "0", "64", "+0.0% (+0.0% to +0.0%)", "-20.0% (-20.0% to -20.0%)", "27.0", "5.1250"],
    ]
    assert verdict == (
        "bf16 from 3 different weights: 4.9583, another would lie within 0.9487 (95%); so do all in float8"
    )
    assert curves.splitlines()[0].split("|")[2].strip() == "1 to 8"
    assert curves.splitlines()[3].count("9.0000") == 6
    assert curves.splitlines()[3].count("5.2500") == 2


def test_a_loss_beyond_the_noise_is_named(llama: ModuleType) -> None:
    runs = llama.runs_of({"bf16": (), "table": ("a",), "plan": ("b", "c")}, {})
    losses = {"bf16": 5.0, "table": 5.25, "plan": 6.0, "bf16, weights 1": 4.75, "bf16, weights 2": 5.125}
    text = llama.report(header(llama, *runs), made_visits(llama, dict.fromkeys(losses, 0.5), losses))
    assert "another would lie within 0.9487 (95%); beyond that: plan" in text
