"""Two layers of Llama 3 70B on the meta device under tensor parallelism, as transformers builds and divides them."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchao.float8 import convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear

from fp8gate import NothingConvertedWarning, NotPlainLinearWarning, Parallel, auto_filter
from fp8gate.filter.explain.explanation import explain
from fp8gate.filter.locate.places import ENVIRONMENT
from fp8gate.filter.model.model_config import BUNDLED, linear_roles
from fp8gate.filter.model.parallel import Shards
from fp8gate.filter.observe.describe import describe_model

transformers = pytest.importorskip("transformers", minversion="5.0", reason="needs transformers")

TP, TOKENS = 8, 8192
CONFIG = BUNDLED["llama3-70b"]
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
ATTENTION = {f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in ("q", "k", "v", "o")}
NOT_ON_THE_GRID = {"on_stale": "ignore", "on_outside": "ignore"}  # the tables are of other versions than are here


@pytest.fixture(autouse=True)
def _packaged_tables(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)


@pytest.fixture
def llama():
    config = transformers.LlamaConfig(num_hidden_layers=2, **{size: getattr(CONFIG, size) for size in SIZES})
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def mesh():
    """A mesh of eight ranks over a fake process group."""
    dist.init_process_group("fake", rank=0, world_size=TP, store=FakeStore())
    yield init_device_mesh("cpu", (TP,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


def as_torch_plan(tp_plan):
    """torch's styles for these strings, without the embedding, which is no linear."""
    styles = {"colwise": ColwiseParallel, "colwise_gather_output": ColwiseParallel, "rowwise": RowwiseParallel}
    return {name: styles[style]() for name, style in tp_plan.items() if name != "model.embed_tokens"}


def checked(model, **parallel):
    asked = auto_filter(
        "rowwise", tokens=TOKENS, device="NVIDIA H200", parallel=Parallel(**parallel), **NOT_ON_THE_GRID
    )
    asked.check(model)
    return asked


def quietly_checked(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotPlainLinearWarning)
        warnings.simplefilter("ignore", NothingConvertedWarning)
        return checked(model)


def explained(tp):
    """name with layer indices as * -> the decision that `fp8gate explain` shows."""
    parallel = Parallel(tp=tp, plan="transformers")
    asked = auto_filter("rowwise", tokens=TOKENS, device="NVIDIA H200", parallel=parallel, **NOT_ON_THE_GRID)
    return {layer.linear.fqn: layer.decision for layer in explain(describe_model("llama3-70b", TOKENS), asked).layers}


def by_name(decisions):
    """name with layer indices as * -> decision. All layers of a model must agree."""
    names = {}
    for fqn, decision in decisions.items():
        assert names.setdefault(re.sub(r"\d+", "*", fqn), decision) == decision
    return names


@pytest.mark.parametrize("plan", [dict, as_torch_plan], ids=["the model's plan", "as torch's styles"])
def test_attention_of_a_rank_is_refused(llama, plan):
    asked = checked(llama, tp=TP, plan=plan(llama.tp_plan))
    assert {fqn for fqn, decision in asked.decisions.items() if not decision.convert} >= ATTENTION
    assert {(d.k, d.n) for fqn, d in asked.decisions.items() if fqn.endswith(("k_proj", "v_proj"))} == {(8192, 128)}
    assert by_name(asked.decisions) == explained(TP)
    convert_to_float8_training(llama, module_filter_fn=asked)
    float8 = {fqn for fqn, module in llama.named_modules() if isinstance(module, Float8Linear)}
    assert float8 == {fqn for fqn, decision in asked.decisions.items() if decision.convert}


def test_whole_layers_would_be_converted(llama):
    """The answers of a filter that does not know of shards."""
    asked = checked(llama)
    converted = {fqn for fqn, decision in asked.decisions.items() if decision.convert}
    assert converted >= {fqn for fqn in ATTENTION if fqn.endswith(("q_proj", "o_proj"))}
    assert by_name(asked.decisions) == explained(1)


def test_ready_plan_is_the_models_own(llama):
    assert checked(llama, tp=TP, plan="transformers").decisions == checked(llama, tp=TP, plan=llama.tp_plan).decisions


def test_roles_are_the_models_linears(llama):
    linears = {re.sub(r"\d+", "*", fqn): m for fqn, m in llama.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {fqn: (m.in_features, m.out_features) for fqn, m in linears.items()} == {
        role.fqn: (role.in_features, role.out_features) for role in linear_roles(CONFIG)
    }


def test_model_that_transformers_divided_is_left_alone_at_the_shapes_of_a_rank(llama, mesh):
    """Its linears have forwards of their own, which communicate: torchao's conversion would drop them."""
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    plan, *_ = llama._resolve_parallel_plans(DistributedConfig(tp_size=TP))
    apply_tensor_parallelism(llama, mesh, plan)
    decisions = by_name(quietly_checked(llama).decisions)
    assert {fqn: d.shape for fqn, d in decisions.items()} == {fqn: d.shape for fqn, d in explained(TP).items()}
    replaced = [fqn for fqn, d in decisions.items() if d.reason.startswith("its forward was replaced, as by transf")]
    assert len(replaced) == 8
    assert not any(d.convert for d in decisions.values())


def test_model_that_torch_divided_needs_no_plan(llama, mesh):
    parallelize_module(llama, mesh, as_torch_plan(llama.tp_plan))
    assert by_name(checked(llama).decisions) == explained(TP)


def test_every_pattern_of_the_models_plan_matches(llama):
    asked = auto_filter(
        "rowwise",
        tokens=TOKENS,
        device="NVIDIA H200",
        parallel=Parallel(tp=TP, plan=llama.tp_plan),
        on_unmatched="error",
        **NOT_ON_THE_GRID,
    )
    assert not [f for f in asked.check(llama) if "matched" in f.message]


@pytest.mark.filterwarnings("ignore::fp8gate.FilterWarning")
def test_every_pattern_of_a_mixtures_plan_matches():
    """Its experts are parameters of no linear, but the plan divides them too."""
    config = transformers.MixtralConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1024,
        num_local_experts=4,
    )
    with torch.device("meta"):
        mixtral = transformers.MixtralForCausalLM(config)
    asked = checked(mixtral, tp=2, plan=mixtral.tp_plan)
    assert asked.left_alone == ("model.layers.*.mlp.experts",)
    assert [f.message for f in asked.check() if f.message.startswith("parallel.plan")] == []


def test_every_style_of_transformers_is_known():
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    unknown = set()
    for name in ALL_PARALLEL_STYLES:
        try:
            Parallel(tp=2, plan={"w1": name})
        except ValueError:
            unknown.add(name)
    assert unknown == set()


@pytest.mark.parametrize(
    "name", ["colwise", "rowwise", "packed_colwise", "packed_rowwise", "sequence_parallel", "replicate"]
)
def test_transformers_styles_divide_as_their_names_say(name):
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    by_name, by_object = (
        Shards(Parallel(tp=2, plan={"w1": style}), 32).local_shape("w1", 64, 128)
        for style in (name, ALL_PARALLEL_STYLES[name])
    )
    assert by_object == by_name
    sizes = {"colwise": (32, 64, 64), "rowwise": (32, 32, 128), "sequence_parallel": (16, 64, 128)}
    assert (by_name.m, by_name.k, by_name.n) == sizes.get(name.removeprefix("packed_"), (32, 64, 128))
