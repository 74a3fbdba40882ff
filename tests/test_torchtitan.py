"""fp8gate.torchtitan.gate, run by torchtitan's own machinery: its command line, its config tree, its overrides.

`configured` does what torchtitan's Trainer does with a config before it builds a model. The Trainer itself, which does
not support a CPU, runs in the slow tests; `titan_on_cpu.py` gives it what it needs a GPU for.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch._inductor.config
from builders import make_point, make_table, write_file
from forked import Processes, rank_environments, run_script
from plans import make_plan

import fp8gate
from fp8gate import AutoFilter, Parallel, UnmeasuredSettingWarning, auto_filter, casts
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.names import without_indices
from fp8gate.filter.contract.plans.plan import Candidate
from fp8gate.filter.contract.plans.plan_file import write_plans
from fp8gate.filter.contract.table import Table

if util.find_spec("torchtitan") is None:
    pytest.skip("not installed: torchtitan", allow_module_level=True)

from torchao.float8 import Float8LinearConfig
from torchtitan.components.quantization import float8 as titan_float8
from torchtitan.components.quantization.float8 import Float8Linear
from torchtitan.config import ConfigManager, apply_overrides
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.models.llama3 import config_registry as llama3_configs

from fp8gate.torchtitan import GateSettings, gate

pytestmark = [
    pytest.mark.filterwarnings("ignore::fp8gate.FilterWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

H200 = {"device": "NVIDIA H200", "emulate": True}
ROWS, DIM, HIDDEN, QKV, VOCAB = 32, 256, 768, 768, 2048  # of the debug model, with a batch of 1 x 32 tokens
BATCH_OF_ONE = ("--training.local_batch_size", "1")
NO_CHECKPOINTING = "activation-checkpoint:none"
TINY = (*BATCH_OF_ONE, "--training.seq_len", str(ROWS))
TABLE = make_table(
    make_point(ROWS, DIM, QKV, 1.5),  # wqkv, w1 and w3, which have the same size
    make_point(ROWS, DIM, DIM, 0.5),  # wo
    make_point(ROWS, HIDDEN, DIM, 0.5),  # w2
)
FEED_FORWARD = ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
WIN = ["attention.qkv_linear.wqkv", "feed_forward.w1", "feed_forward.w3"]


@pytest.fixture(autouse=True)
def inductor_settings() -> Iterator[None]:
    with torch._inductor.config.patch(emulate_precision_casts=False):  # torchtitan sets it for rowwise, for good
        yield


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchtitan's converters take this machine for one that computes float8."""
    monkeypatch.setattr(titan_float8, "has_cuda_capability", lambda *version: True)


def gate_entry(**settings: Any) -> str:
    return f"fp8gate.torchtitan.gate={json.dumps({'recipe': 'rowwise', **settings})}"


def configured(module: str, config: str, *arguments: str, edit: Callable[[Any], None] | None = None, **settings: Any):
    """The config of a run, as torchtitan's Trainer has it when it builds the model. edit: changes it before."""
    command = ["--module", module, "--config", config, "--override.imports", gate_entry(**settings), *arguments]
    run = ConfigManager().parse_args(command)
    if edit:
        edit(run)
    run.model_spec.model.update_from_config(config=run)
    apply_overrides(run.override, run)
    return run


def linears(run: Any) -> dict[str, Any]:
    return {fqn: config for fqn, config, *_ in run.model_spec.model.traverse(Linear.Config)}


def float8_names(run: Any) -> list[str]:
    """The linears that torchtitan will build in float8, without the indices of layers."""
    names = [fqn for fqn, config in linears(run).items() if isinstance(config, Float8Linear.Config)]
    return list(dict.fromkeys(without_indices(fqn).removeprefix("layers.*.") for fqn in names))


def asked_alone(run: Any, **settings: Any) -> AutoFilter:
    """fp8gate's filter, asked about all linears of the layers but routers, without torchtitan's overrides."""
    wants_float8 = auto_filter("rowwise", device="NVIDIA H200", compiled=True, **settings)
    asked = [
        (fqn, c) for fqn, c in linears(run).items() if fqn.startswith("layers.") and not fqn.endswith("router.gate")
    ]
    sizes = [(fqn, Linear.Config(in_features=c.in_features, out_features=c.out_features)) for fqn, c in asked]
    wants_float8.check(sizes)
    return wants_float8


@pytest.fixture
def debug(tmp_path: Path) -> Callable[..., Any]:
    """Configures torchtitan's debug model, by a table of its sizes in which wqkv, w1 and w3 win."""
    table = str(write_file(TABLE, tmp_path / "rowwise.yaml"))

    def configure(*arguments: str, config: str = "llama3_debugmodel", **settings: Any) -> Any:
        return configured("llama3", config, *TINY, *arguments, **{"tables": table, "emulate": True, **settings})

    return configure


# --- what is converted -----------------------------------------------------------------------------------------


def test_llama3_8b_converts_the_fastest_measured_set_with_wqkv_whole(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fp8gate")
    run = configured("llama3", "llama3_8b", **H200)
    alone = asked_alone(run, tokens=8192)
    decided = {fqn: decision.convert for fqn, decision in alone.decisions.items()}
    found = {fqn: isinstance(c, Float8Linear.Config) for fqn, c in linears(run).items() if fqn != "lm_head"}
    assert found == decided
    assert float8_names(run) == ["attention.qkv_linear.wqkv", *FEED_FORWARD]
    assert "converted 128 of 160 linears to float8 rowwise" in caplog.text
    assert len(caplog_lines(caplog, "wqkv .* the plan's fastest measured set with wqkv whole: block 1.095x")) == 1
    assert "not asked about: lm_head: the head" in caplog.text
    assert 'SelectiveAC runs a part of the forward twice, which was not measured: decided by "recompute": "none"' in (
        caplog.text
    )


def test_llama3_70b_is_decided_by_its_own_tp_and_recomputation(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fp8gate")
    run = configured("llama3", "llama3_70b", *BATCH_OF_ONE, tokens=8192, tp=8, **H200)
    plan = Parallel(tp=8, plan="torchtitan")
    alone = asked_alone(run, tokens=8192, parallel=plan, recompute="full")
    wins = [fqn for fqn, decision in alone.decisions.items() if decision.convert]
    assert [fqn for fqn, config in linears(run).items() if isinstance(config, Float8Linear.Config)] == wins
    assert len(wins) % 80 == 0
    for row in ("wqkv +80 +8192 +8192 +1280 +bf16", "wo +80 +8192 +1024 +8192", r"w1 +80 +8192 +8192 +3584"):
        assert len(caplog_lines(caplog, row)) == 1
    assert "recompute" not in caplog.text.split("not asked about")[1]


def caplog_lines(caplog: pytest.LogCaptureFixture, pattern: str) -> list[str]:
    return [line for line in caplog.text.splitlines() if re.search(pattern, line)]


def test_llama3_70b_is_decided_by_its_plan_where_nothing_is_recomputed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fp8gate")
    run = configured("llama3", "llama3_70b", *BATCH_OF_ONE, NO_CHECKPOINTING, **H200)
    assert float8_names(run) == ["feed_forward.w2", "feed_forward.w3"]
    assert "the plan: block 1.074x" in caplog.text
    assert "llama3-70b-rowwise-m8192-tp8.yaml" in caplog.text
    assert "fits only if" not in caplog.text


def test_the_table_decides_without_a_plan() -> None:
    run = configured("llama3", "llama3_70b", *BATCH_OF_ONE, NO_CHECKPOINTING, plan=None, **H200)
    alone = asked_alone(run, tokens=8192, parallel=Parallel(tp=8, plan="torchtitan"), plan=None)
    wins = [fqn for fqn, decision in alone.decisions.items() if decision.convert]
    assert [fqn for fqn, config in linears(run).items() if isinstance(config, Float8Linear.Config)] == wins
    assert len(wins) == 240


@pytest.mark.parametrize("plan", ["llama3-70b", "thresholds/nvidia-h200/plans/llama3-70b-rowwise-m8192-tp8.yaml"])
def test_a_plan_may_be_named(plan: str) -> None:
    plan = plan if "/" not in plan else str(Path(fp8gate.__file__).parent / plan)
    run = configured("llama3", "llama3_70b", *BATCH_OF_ONE, NO_CHECKPOINTING, plan=plan, **H200)
    assert float8_names(run) == ["feed_forward.w2", "feed_forward.w3"]


def test_a_plan_with_a_fused_role_decides_torchtitans_wqkv(debug: Callable[..., Any], tmp_path: Path) -> None:
    shapes = {
        "self_attn.qkv_proj": (ROWS, DIM, QKV),
        "self_attn.o_proj": (ROWS, DIM, DIM),
        "mlp.gate_proj": (ROWS, DIM, HIDDEN),
        "mlp.up_proj": (ROWS, DIM, HIDDEN),
        "mlp.down_proj": (ROWS, HIDDEN, DIM),
    }
    none = Candidate((), 7, 100.0, 200.0, 1.0, 1.0, 1.0, 1.0, 0.0, "measured")
    best = Candidate(("self_attn.qkv_proj", "mlp.down_proj"), 7, 90.0, 180.0, 1.1, 1.09, 1.12, 1.05, 0.0, "measured")
    rest = {"indivisible": (), "left_alone": (), "table": None, "torchao": None}
    plan = make_plan(shapes=shapes, convert=best.convert, candidates=(none, best), **rest)
    path = tmp_path / "plan.yaml"
    write_plans((plan,), path)
    assert float8_names(debug(plan=str(path))) == ["attention.qkv_linear.wqkv", "feed_forward.w2"]


@pytest.mark.parametrize(
    ("module", "config", "expected"),
    [
        (
            "qwen3",
            "qwen3_14b",
            ["attention.qkv_linear.wqkv", "attention.wo", *(f"feed_forward.w{i}" for i in (1, 2, 3))],
        ),
        ("deepseek_v3", "deepseek_v3_16b", ["feed_forward.w1", "feed_forward.w3"]),
        (
            "deepseek_v3",
            "deepseek_v3_671b",
            [
                "attention.wq_b",
                "attention.wo",
                *FEED_FORWARD,
                "moe.shared_experts.w2",
            ],
        ),
        ("gpt_oss", "gpt_oss_20b", []),
        ("muse_glimmer", "muse_glimmer_30b", None),
    ],
)
def test_other_models_are_decided_as_the_filter_decides(module: str, config: str, expected: list[str] | None) -> None:
    run = configured(module, config, **H200)
    training, parallelism = run.training, run.parallelism
    full = type(run.activation_checkpoint).__qualname__ == "FullAC.Config"
    alone = asked_alone(
        run,
        tokens=training.local_batch_size * training.seq_len,
        recompute="full" if full else "none",
        filter_fqns=["attention.wo"] if module == "gpt_oss" else [],  # it has a forward of its own there
    )
    assert parallelism.tensor_parallel_degree == 1
    wins = [fqn for fqn, decision in alone.decisions.items() if decision.convert]
    assert [fqn for fqn, c in linears(run).items() if isinstance(c, Float8Linear.Config)] == wins
    assert expected is None or float8_names(run) == expected


def test_experts_and_routers_stay_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fp8gate")
    run = configured("deepseek_v3", "deepseek_v3_debugmodel", **H200)
    experts = [type(config) for _, config, *_ in run.model_spec.model.traverse(GroupedExperts.Config)]
    assert experts
    assert set(experts) == {GroupedExperts.Config}
    assert "not asked about: layers.*.moe.router.gate: a router" in caplog.text
    assert "not asked about: layers.*.moe.routed_experts.inner_experts: grouped experts" in caplog.text


def test_tensor_parallelism_is_read_from_the_models_sharding(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fp8gate")
    parallel = ("--parallelism.tensor_parallel_degree", "4")
    configured("deepseek_v3", "deepseek_v3_16b", *parallel, **H200)
    for row in (
        "attention.wq +27 +16384 +2048 +768 ",  # colwise
        "attention.wkv_a +27 +16384 +2048 +576 ",  # replicated
        "attention.wo +27 +16384 +512 +2048 ",  # rowwise
        "moe.shared_experts.w2 +26 +16384 +704 +2048 ",
    ):
        assert len(caplog_lines(caplog, row)) == 1, row


def test_unfused_projections_are_decided_apart(debug: Callable[..., Any], tmp_path: Path) -> None:
    table = make_table(
        make_point(ROWS, 256, 2048, 1.5), make_point(ROWS, 256, 1024, 0.5), make_point(ROWS, 4096, 1, 1.0)
    )
    path = str(write_file(table, tmp_path / "unfused.yaml"))
    run = configured("qwen3", "qwen3_debugmodel_non_fused_qkv", *TINY, tables=path, lookup="nearest", emulate=True)
    assert "attention.qkv_linear.wq" in float8_names(run)
    assert "attention.qkv_linear.wkv" not in float8_names(run)


def test_context_and_pipeline_parallelism_change_the_rows(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fp8gate")
    degrees = ("--parallelism.context_parallel_degree", "2", "--parallelism.pipeline_parallel_degree", "2")
    batch = ("--training.local_batch_size", "8", "--training.disable_cuda_graphs")
    microbatch = ("--parallelism.pipeline_parallel_microbatch_size", "4")
    configured("llama3", "llama3_8b", *degrees, *batch, *microbatch, tokens=32768, cp=2, **H200)
    assert len(caplog_lines(caplog, r"w1 +32 +16384 +4096 +14336 ")) == 1


def test_the_config_keeps_its_sharding_and_its_initialization(debug: Callable[..., Any]) -> None:
    run = debug()
    w1, w2 = (linears(run)[f"layers.0.feed_forward.w{i}"] for i in (1, 2))
    assert type(w1) is Float8Linear.Config
    assert type(w2) is Linear.Config
    assert set(w1.sharding_config.state_shardings) == {"weight", "bias"}
    assert w1.param_init is not None
    assert (w1.in_features, w1.out_features, w1.bias) == (DIM, HIDDEN, False)


def with_bias(run: Any) -> None:
    for layer in run.model_spec.model.layers:
        layer.attention.qkv_linear.wqkv.bias = layer.attention.wo.bias = True


@pytest.mark.parametrize("replace", [False, True])
def test_a_bias_is_kept(debug: Callable[..., Any], with_converter: Callable[..., Any], replace: bool) -> None:
    run = with_converter({"replace": True, "edit": with_bias}) if replace else debug(edit=with_bias)
    assert float8_names(run) == WIN  # with its own converter, torchtitan had converted wo, too
    biased = {without_indices(fqn).removeprefix("layers.*.") for fqn, config in linears(run).items() if config.bias}
    assert biased == {"attention.qkv_linear.wqkv", "attention.wo"}


@pytest.mark.parametrize(("lookup", "wins"), [("nearest", WIN), ("interpolate", [])])
def test_the_lookup_is_the_one_asked_for(
    debug: Callable[..., Any], tmp_path: Path, lookup: str, wins: list[str]
) -> None:
    table = make_table(make_point(ROWS, DIM, 512, 0.5), make_point(ROWS, DIM, 1024, 1.5))  # around QKV and HIDDEN
    path = str(write_file(table, tmp_path / "around.yaml"))
    assert float8_names(debug(tables=path, lookup=lookup)) == wins


def test_layers_that_predict_further_tokens_are_not_asked_about(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fp8gate")
    run = configured("deepseek_v3", "deepseek_v3_debugmodel_mtp", min_speedup=0.01, **H200)
    of_mtp = {type(config) for fqn, config in linears(run).items() if fqn.startswith("mtp_layers.")}
    assert of_mtp == {Linear.Config}
    assert float8_names(run)
    assert re.search(r"not asked about: .*mtp_layers\.\*\.attention\.wo.*: in no layer of the decoder", caplog.text)


def test_filter_fqns_are_kept(debug: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fp8gate")
    run = debug(filter_fqns=["wqkv", "layers.0.", "lm_head"])
    assert float8_names(run) == WIN[1:]
    assert not isinstance(linears(run)["layers.0.feed_forward.w1"], Float8Linear.Config)
    assert "matched no linear" not in caplog.text


def test_a_pattern_that_matches_nothing_is_said(debug: Callable[..., Any]) -> None:
    with pytest.warns(fp8gate.UnmatchedPatternWarning, match="'wqvk' is in no linear's name"):
        debug(filter_fqns=["wqvk"])


def test_the_head_is_asked_about_if_told(
    debug: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fp8gate")
    table = make_table(*TABLE.points, make_point(ROWS // 2, DIM, VOCAB, 1.5))
    path = str(write_file(table, tmp_path / "with_head.yaml"))
    assert float8_names(debug(tables=path)) == WIN
    with_head = debug(tables=path, head=True, rows={"lm_head": ROWS // 2})
    assert float8_names(with_head) == ["lm_head", *WIN]
    assert "the head is not compiled" not in caplog.text


def test_a_head_beside_compiled_layers_is_not_compiled_itself(a_gpu: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fp8gate")
    rows = {"lm_head": 1024}
    configured("llama3", "llama3_8b", "--compile.enable", **{**H200, "emulate": False, "head": True, "rows": rows})
    assert "the head is not compiled, and tables are of compiled linears" in caplog.text


def test_what_is_computed_otherwise_is_left_alone(debug: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fp8gate")
    run = debug(config="llama3_debugmodel_dist_gemm")
    assert float8_names(run) == []
    assert "its weight is read by a product that is fused with a collective" in caplog.text
    assert "RowParallelLinear.Config is no plain linear" in caplog.text


# --- what float8 needs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "expected"), [("rowwise", True), ("rowwise_with_gw_hp", False)])
def test_inductor_is_set_as_torchtitans_converter_sets_it(recipe: str, expected: bool) -> None:
    configured("llama3", "llama3_8b", **{**H200, "recipe": recipe})
    assert torch._inductor.config.emulate_precision_casts is expected


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_with_gw_hp"])
def test_converted_linears_compute_by_the_recipe(recipe: str, a_gpu: None, tmp_path: Path) -> None:
    table = msgspec.structs.replace(TABLE, recipe=recipe)
    run = configured(
        "llama3", "llama3_debugmodel", *TINY, recipe=recipe, tables=str(write_file(table, tmp_path / "t.yaml"))
    )
    converted = [config for config in linears(run).values() if isinstance(config, Float8Linear.Config)]
    assert converted
    expected = Float8LinearConfig.from_recipe_name(recipe)
    assert all(config._torchao_config == expected for config in converted)


@pytest.fixture
def both_casts(tmp_path: Path) -> Iterator[Path]:
    """Tables of both casts, which say the opposite of each other. fp8gate's are off after a test."""
    folder = tmp_path / "both" / "nvidia-h200"
    opposite = tuple(make_point(p.m, p.k, p.n, 2.0 - (p.speedup or 0)) for p in TABLE.points)
    protocol = msgspec.structs.replace(TABLE.protocol, casts="fp8gate")
    for table in (TABLE, msgspec.structs.replace(TABLE, points=opposite, protocol=protocol)):
        write_file(table, folder / table.variant.file)
    with casts.not_replaced():
        yield folder


def test_the_casts_are_turned_on_and_their_table_decides(
    debug: Callable[..., Any], both_casts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fp8gate")
    assert float8_names(debug(tables=str(both_casts))) == WIN
    assert not casts.is_enabled()
    assert "casts" not in caplog.text
    assert float8_names(debug(tables=str(both_casts), casts="fp8gate")) == ["attention.wo", "feed_forward.w2"]
    assert casts.is_enabled()
    assert "to float8 rowwise, fp8gate's casts (" in caplog.text
    assert "fp8gate's casts are on\n" in caplog.text


def test_nothing_is_said_of_casts_where_they_have_nothing_to_do(
    debug: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fp8gate")
    monkeypatch.setenv("FP8GATE_CASTS", "1")
    recipe = "rowwise_with_gw_hp"
    table = write_file(msgspec.structs.replace(TABLE, recipe=recipe), tmp_path / f"{recipe}.yaml")
    with casts.not_replaced():
        debug(recipe=recipe, tables=str(table))
        assert casts.is_enabled()
    assert "fp8gate.torchtitan.gate:" in caplog.text
    assert "casts are on" not in caplog.text


def test_without_the_key_what_is_enabled_decides(debug: Callable[..., Any], both_casts: Path) -> None:
    with casts.replaced():
        assert float8_names(debug(tables=str(both_casts))) == ["attention.wo", "feed_forward.w2"]
        with pytest.raises(UnmeasuredSettingWarning, match="fp8gate's casts are on, and what was measured had Ind"):
            debug(tables=str(both_casts), casts="inductor", strict=True)


@pytest.mark.parametrize(("recipe", "asked"), [("rowwise", "triton"), ("rowwise_with_gw_hp", "fp8gate")])
def test_casts_that_the_recipe_cannot_have_are_refused(debug: Callable[..., Any], recipe: str, asked: str) -> None:
    with pytest.raises(InputError, match=r"^fp8gate\.torchtitan\.gate: casts: expected (one of )?inductor"):
        debug(recipe=recipe, casts=asked)
    assert not casts.is_enabled()


def test_a_model_that_stays_in_bf16_is_compiled_as_without_the_override(debug: Callable[..., Any]) -> None:
    debug(min_speedup=9.0)
    assert torch._inductor.config.emulate_precision_casts is False


def test_a_backend_that_fuses_nothing_is_no_compilation(a_gpu: None) -> None:
    with pytest.warns(UnmeasuredSettingWarning, match=r"torch\.compile"):
        configured(
            "llama3",
            "llama3_8b",
            "--compile.enable",
            "--compile.backend",
            "aot_eager",
            device="NVIDIA H200",
            recipe="rowwise",
        )


def test_layers_that_share_a_config_cannot_be_decided_apart(debug: Callable[..., Any]) -> None:
    def share(run: Any) -> None:
        first, *others = run.model_spec.model.layers
        for layer in others:
            layer.feed_forward = first.feed_forward

    with pytest.raises(
        InputError, match=r"layers\.0\.feed_forward\.w\d and layers\.1\.feed_forward\.w\d have one together"
    ):
        debug(edit=share)


def test_without_torchtitan_the_error_names_it() -> None:
    script = "import sys; sys.modules['torchtitan'] = None; import fp8gate.torchtitan"
    environment = {**os.environ, "PYTHONPATH": str(Path(fp8gate.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert "fp8gate.torchtitan needs torchtitan 0.3.0: pip install torchtitan==0.3.0" in done.stderr


def test_the_workaround_for_transposed_stores_is_applied(debug: Callable[..., Any], monkeypatch: Any) -> None:
    from torch._inductor.codegen.triton import TritonOverrides
    from torchao.float8 import _inductor_patch

    monkeypatch.setattr(_inductor_patch, "_PATCHED", False)
    for name in ("minimum", "maximum"):
        monkeypatch.setattr(TritonOverrides, name, staticmethod(lambda a, b: "not patched"))
    debug()
    assert TritonOverrides.minimum("a", "b") == "tl.where((a < b) | (a != a), a, b)"


def test_a_model_of_the_config_trains(debug: Callable[..., Any]) -> None:
    """A step of torchtitan's debug model on the CPU, with attention that runs there."""
    model_config = debug().model_spec.model
    for layer in model_config.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    torch.manual_seed(0)
    model = model_config.build()
    model.verify_module_protocol()
    model.init_states()
    assert sum(isinstance(module, Float8Linear) for module in model.modules()) == len(WIN) * len(model_config.layers)
    tokens = torch.randint(0, VOCAB, (1, ROWS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > losses[1] > losses[2]


def test_ranks_compare_what_they_decided(debug: Callable[..., Any], monkeypatch: Any) -> None:
    asked = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(AutoFilter, "agree", lambda self: asked.append(len(self.decisions)))
    for backend, expected in (("nccl", [30]), ("fake", [])):
        monkeypatch.setattr(torch.distributed, "get_backend", lambda backend=backend: backend)
        asked.clear()
        debug()
        assert asked == expected


def test_ranks_that_disagree_leave_the_config_as_it_was(debug: Callable[..., Any], monkeypatch: Any) -> None:
    def disagree(_: AutoFilter) -> None:
        raise fp8gate.RanksDisagreeError("rank 1 would convert other layers")

    runs: list[Any] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(AutoFilter, "agree", disagree)
    with pytest.raises(fp8gate.RanksDisagreeError):
        debug(edit=runs.append)
    assert float8_names(*runs) == []


TRAINER = Path(__file__).parent / "titan_on_cpu.py"


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Callable[..., list[str]]]:
    """Trains the debug model for two steps with torchtitan's Trainer, on the CPU; what each rank says."""
    processes = Processes(tmp_path)

    def start(*arguments: str, ranks: int, table: Table, **settings: Any) -> list[str]:
        path = write_file(table, tmp_path / "rowwise.yaml")
        entry = gate_entry(tables=str(path), emulate=True, **settings)
        command = ("--module", "llama3", "--config", "llama3_debugmodel", "--override.imports", entry, *TINY)
        folder = ("--dump_folder", str(tmp_path), "--training.disable_cuda_graphs", "--metrics.disable_color_printing")
        script = functools.partial(run_script, TRAINER, 2, *command, *folder, *arguments)
        running = [
            processes.start(script, OMP_NUM_THREADS=1, **environment) for environment in rank_environments(ranks)
        ]
        assert [process.exit_code() for process in running] == [0] * ranks, "\n".join(p.said for p in running)
        return [process.said for process in running]

    yield start
    processes.kill()


def losses(said: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"step: +\d+ +loss: +(\S+)", said)]


@pytest.mark.slow
def test_torchtitans_trainer_trains_what_it_was_given(train: Callable[..., list[str]]) -> None:
    (said,) = train(ranks=1, table=TABLE, tokens=ROWS, tp=1)
    assert "converted 18 of 30 linears to float8 rowwise" in said
    assert "\n18 Float8Linear" in said
    first, second = losses(said)
    assert second < first


@pytest.mark.slow
def test_torchtitans_trainer_trains_under_tensor_parallelism(train: Callable[..., list[str]]) -> None:
    """torch 2.13 lacks what torchtitan's default backend needs for it; the backend of DTensors runs."""
    table = make_table(
        make_point(ROWS, DIM, QKV // 2, 1.5),  # wqkv, w1 and w3
        make_point(ROWS, DIM // 2, DIM, 0.5),  # wo
        make_point(ROWS, HIDDEN // 2, DIM, 1.5),  # w2
    )
    degree = ("--parallelism.tensor_parallel_degree", "2", "--parallelism.spmd_backend", "partial_dtensor")
    for said in train(*degree, ranks=2, table=table, tp=2):
        assert "converted 24 of 30 linears to float8 rowwise" in said
        assert "\n24 Float8Linear" in said
        first, second = losses(said)
        assert second < first


# --- torchtitan's own converter --------------------------------------------------------------------------------


def of_converter(**fields: Any) -> Callable[[], Any]:
    """A config of the debug model with torchtitan's Float8LinearConverter, as a user writes it."""

    def registered() -> Any:
        config = llama3_configs.llama3_debugmodel()
        converters = [titan_float8.Float8LinearConverter.Config(emulate=True, **fields)]
        config.model_spec = llama3_configs.model_registry("debugmodel", converters=converters)
        return config

    return registered


@pytest.fixture
def with_converter(debug: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def configure(settings: dict[str, Any], **fields: Any) -> Any:
        monkeypatch.setattr(llama3_configs, "llama3_float8", of_converter(**fields), raising=False)
        return debug(config="llama3_float8", **settings)

    return configure


def test_what_torchtitans_converter_converts_is_kept_if_it_wins(
    with_converter: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fp8gate")
    run = with_converter({}, filter_fqns=["lm_head", "wo", "w2", "w3"])
    assert float8_names(run) == ["attention.qkv_linear.wqkv", "feed_forward.w1"]
    assert "torchtitan's Float8LinearConverter had converted 12 linears, and nothing else is converted" in caplog.text
    assert "left in bf16, as that converter left them, though they win: layers.*.feed_forward.w3" in caplog.text


def test_what_torchtitans_converter_converts_is_refused_if_it_loses(with_converter: Callable[..., Any]) -> None:
    complaint = (
        r"Float8LinearConverter has converted 13 linears that are to stay in bf16: lm_head, layers\.\*\.attention\.wo, "
        r"layers\.\*\.feed_forward\.w2; take torchtitan's .* out of the config, or give \"replace\": true"
    )
    with pytest.raises(InputError, match=complaint):
        with_converter({})


def test_replace_decides_anew(with_converter: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fp8gate")
    run = with_converter({"replace": True}, filter_fqns=["w3"])
    assert float8_names(run) == WIN
    assert type(linears(run)["lm_head"]) is Linear.Config
    assert linears(run)["layers.0.attention.wo"].sharding_config is not None
    assert "had converted 25 linears; 13 of them are in bf16 again" in caplog.text


def test_another_recipe_of_the_converter_is_refused(a_gpu: None, with_converter: Callable[..., Any]) -> None:
    filter_fqns = ["lm_head", "wo", "w2"]
    complaint = "recipe: torchtitan's Float8LinearConverter has converted by another one"
    with pytest.raises(InputError, match=complaint):
        with_converter({"emulate": False}, filter_fqns=filter_fqns)


def test_float8_under_lora_is_refused(debug: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="FrozenFloat8Linear"):
        debug(config="llama3_debugmodel_float8_emulate_lora")


def test_torchtitans_own_float8_config_of_405b_can_be_decided_anew(a_gpu: None) -> None:
    settings = {"device": "NVIDIA H200", "replace": True}
    run = configured("llama3", "llama3_405b", edit=lambda run: setattr(run.compile, "enable", False), **settings)
    plan = Parallel(tp=8, plan="torchtitan")
    alone = asked_alone(run, tokens=2 * 8192, parallel=plan, recompute="full")
    wins = [fqn for fqn, decision in alone.decisions.items() if decision.convert]
    assert [fqn for fqn, config in linears(run).items() if isinstance(config, Float8Linear.Config)] == wins
    assert 0 < len(wins) < len(linears(run)) - 1


# --- what is refused -------------------------------------------------------------------------------------------

REFUSED = [
    ({"recipes": "rowwise"}, "recipes: no such key; expected some of recipe, tokens, tp, cp"),
    (
        {"recipe": "tensorwise"},
        r"recipe: expected one of rowwise, .*, which torchtitan's converter has; got 'tensorwise'",
    ),
    ({"tokens": "32"}, r"Expected `int \| null`, got `str` - at `\$.tokens`"),
    ({"tp": 1.5}, r"Expected `int \| null`, got `float` - at `\$.tp`"),
    ({"cp": True}, r"Expected `int \| null`, got `bool` - at `\$.cp`"),
    ({"rows": {"lm_head": "4"}}, r"rows\['lm_head'\]: expected rows per microbatch, an integer .*; got '4'"),
    ({"filter_fqns": "lm_head"}, r"Expected `array`, got `str` - at `\$.filter_fqns`"),
    ({"filter_fqns": ["auto_filter_small_kn"]}, "filter_fqns: 'auto_filter_small_kn' is torchao's rule"),
    (
        {"recipe": None},
        r"recipe: expected one of rowwise, .*, which torchtitan's converter has; got None",
    ),
    ({"recompute": "half"}, "recompute: expected one of none, full; got 'half'"),
    ({"lookup": "next"}, "lookup: expected one of nearest, interpolate; got 'next'"),
    (
        {"tokens": 64},
        r"tokens: expected 32, by the run's training.local_batch_size x training.seq_len = 1 x 32; got 64",
    ),
    ({"tp": 8}, r"tp: expected 1, by the run's parallelism.tensor_parallel_degree; got 8"),
    ({"cp": 2}, r"cp: expected 1, by the run's parallelism.context_parallel_degree; got 2"),
    ({"head": True}, r"rows: expected those of lm_head, as head is true: tokens / num_chunks if the loss is a Chunked"),
    ({"head": True, "rows": {"w1": 4}}, r"rows: expected those of lm_head"),
    ({"emulate": False}, r'this machine computes no float8; "emulate": true, to test on such a machine'),
    ({"min_speedup": 0}, "min_speedup: expected a ratio above 0"),
    ({"rows": {"*.w1": 0}}, r"rows\['\*\.w1'\]: expected rows per microbatch"),
    ({"plan": "llama9"}, "llama9"),
    ({"tables": "nowhere"}, "nowhere"),
]


@pytest.mark.parametrize(("settings", "complaint"), REFUSED)
def test_a_wrong_setting_is_refused_by_name(debug: Callable[..., Any], settings: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        debug(**settings)


@pytest.mark.parametrize(
    ("arguments", "given", "complaint"),
    [
        ((NO_CHECKPOINTING,), "full", "expected 'none', by the run's activation checkpointing, none; got 'full'"),
        ((), "none", "expected 'full', by the run's activation checkpointing, FullAC; got 'none'"),
    ],
)
def test_recomputation_that_is_not_the_runs_is_refused(arguments: Any, given: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        configured("llama3", "llama3_70b", *arguments, recompute=given, **H200)


def test_emulated_float8_is_for_runs_that_are_not_compiled() -> None:
    with pytest.raises(InputError, match=r'"emulate": true: expected a run without compile\.enable'):
        configured("llama3", "llama3_8b", "--compile.enable", **H200)


def test_a_recipe_is_required() -> None:
    model = llama3_configs.llama3_debugmodel().model_spec.model
    with pytest.raises(InputError, match=r"recipe: expected one of rowwise, .*; got nothing"):
        gate(model)


def test_recompute_decides_where_a_part_is_checkpointed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fp8gate")
    configured("llama3", "llama3_8b", recompute="full", **H200)
    assert 'decided by "recompute": "full"; the other choice is "none"' in caplog.text
    assert "interpolated, recomputed" in caplog.text


def test_a_model_that_is_no_decoder_is_refused() -> None:
    complaint = r"expected the config of a language model, a Decoder.Config; got FluxModel.Config"
    with pytest.raises(InputError, match=complaint):
        configured("flux", "flux_debugmodel", **H200)


def test_an_error_leaves_nothing_to_the_next_run(debug: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fp8gate")
    with pytest.raises(InputError):
        configured("flux", "flux_debugmodel", "activation-checkpoint:full", **H200)
    assert float8_names(debug(NO_CHECKPOINTING)) == WIN
    assert "recomputed" not in caplog.text


def test_strict_makes_doubts_errors(debug: Callable[..., Any]) -> None:
    with pytest.raises(fp8gate.FilterWarning):
        debug(strict=True)  # emulated, and not compiled


@pytest.mark.parametrize(("components", "is_compiled"), [(("model", "loss"), True), (("loss",), False), ((), False)])
def test_training_without_compiling_the_model_is_said(a_gpu: None, components: Any, is_compiled: bool) -> None:
    def compile_these(run: Any) -> None:
        run.compile.enable, run.compile.components = bool(components), list(components)

    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        configured("llama3", "llama3_8b", edit=compile_these, device="NVIDIA H200")
    said = [warning for warning in given if issubclass(warning.category, fp8gate.UnmeasuredSettingWarning)]
    assert bool(said) is not is_compiled


def test_async_tensor_parallelism_is_said(a_gpu: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fp8gate")
    compiled = ("--compile.enable", "--compile.enable_async_tensor_parallel")
    configured("llama3", "llama3_70b", *compiled, device="NVIDIA H200")
    assert "compile.enable_async_tensor_parallel was not measured" in caplog.text


TRAINING_CODE = (Path(__file__).parent.parent / "docs" / "training-code.md").read_text()


def test_the_documented_command_is_one_of_torchtitans() -> None:
    (shown,) = re.findall(r"-m torchtitan\.train (.*?)\n```", TRAINING_CODE.replace("\\\n", " "), flags=re.S)
    run = ConfigManager().parse_args(shlex.split(shown))
    assert run.override.imports == [("fp8gate.torchtitan.gate", {"recipe": "rowwise"})]
    assert run.compile.enable


def test_every_key_is_documented() -> None:
    rows = "".join(line.split("|")[1] for line in TRAINING_CODE.split("## FSDP2")[0].splitlines() if "|" in line)
    assert set(re.findall(r"`(\w+)`", rows)) == set(GateSettings.__struct_fields__)


def test_importing_fp8gate_does_not_import_torchtitan() -> None:
    code = "import sys, fp8gate; assert 'torchtitan' not in sys.modules"
    source = str(Path(fp8gate.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": source})
