"""The shape that a rank multiplies, compared with the shards that torch cuts real modules into."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from builders import make_point, make_table, write_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchao.float8 import convert_to_float8_training
from torchao.float8.float8_tensor_parallel import Float8ColwiseParallel, Float8RowwiseParallel

from fp8gate import FilterWarning, Parallel, ShardError, UnknownShardWarning, UnmatchedPatternWarning, auto_filter
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.model.linear_layer import LinearSize, linear_size
from fp8gate.filter.model.parallel import READY_PLANS, Shards, divided

TP = 8
TOKENS = 64
DIM, KEY_VALUE_DIM, HIDDEN, VOCABULARY = 256, 128, 512, 1024


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(DIM)
        self.attention = nn.ModuleDict(
            {
                "wq": nn.Linear(DIM, DIM),
                "wk": nn.Linear(DIM, KEY_VALUE_DIM, bias=False),
                "wv": nn.Linear(DIM, KEY_VALUE_DIM, bias=False),
                "wo": nn.Linear(DIM, DIM),
            }
        )
        self.feed_forward = nn.ModuleDict({"w1": nn.Linear(DIM, HIDDEN), "w2": nn.Linear(HIDDEN, DIM)})


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, DIM)
        self.layers = nn.ModuleDict({"0": Block(), "1": Block()})
        self.norm = nn.LayerNorm(DIM)
        self.output = nn.Linear(DIM, VOCABULARY)


def model_on(device="meta"):
    with torch.device(device):
        return Model()


def linears(model):
    return {fqn: module for fqn, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.fixture(scope="module", autouse=True)
def _ranks():
    """A fake process group of eight ranks. torch cuts shards as for real ranks, and sends nothing."""
    dist.init_process_group("fake", rank=0, world_size=TP, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.fixture
def mesh():
    return init_device_mesh("cpu", (TP,), mesh_dim_names=("tp",))


# --- as torch does it ------------------------------------------------------------------------------------------

BLOCK = {
    "attention": PrepareModuleInput(input_layouts=(None,), desired_input_layouts=(None,)),
    "attention.wq": ColwiseParallel(),
    "attention.wk": ColwiseParallel(),
    "attention.wv": ColwiseParallel(use_local_output=False),
    "attention.wo": RowwiseParallel(),
    "attention_norm": SequenceParallel(),
    "feed_forward.w1": ColwiseParallel(),
    "feed_forward.w2": RowwiseParallel(),
}
WHOLE_MODEL = {
    "tok_embeddings": RowwiseParallel(),
    "norm": SequenceParallel(),
    "output": ColwiseParallel(),
    **{f"layers.*.{name}": style for name, style in BLOCK.items()},
}
PLANS = {
    "whole model": WHOLE_MODEL,
    "nested": {"layers": {"*": {"attention": {"wq": ColwiseParallel()}, "feed_forward.w2": RowwiseParallel()}}},
    "nested in dotted names": {"layers.1": {"attention.wo": RowwiseParallel()}, "output": ColwiseParallel()},
    "the module itself": {"layers.0.attention.wq": {"": ColwiseParallel()}},
    "a plan for the module itself": {"": {"output": ColwiseParallel(), "layers": {"0.*.wk": ColwiseParallel()}}},
    "one layer": {"layers.1.feed_forward.w2": RowwiseParallel()},
    "any one character": {"layers.?.attention.w?": ColwiseParallel()},
    "a set of characters": {"layers.*.attention.w[qk]": ColwiseParallel()},
    "not of a set": {"layers.[!0].*.w[!o]": ColwiseParallel()},
    "wild in the middle": {"lay*s.0.*ward.w1": RowwiseParallel()},
    "a wildcard is one part": {"layers.*.wq": ColwiseParallel(), "*.wk": ColwiseParallel(), "out*": RowwiseParallel()},
    "a name is a whole part": {"layers.0.attention.w": ColwiseParallel(), "output": RowwiseParallel()},
    "a linear within the sequence": {"output": SequenceParallel(), "layers.*.attention.wq": ColwiseParallel()},
}  # fmt: skip
FLOAT8_PLANS = {
    "float8": {"layers.*.attention.w[qkv]": Float8ColwiseParallel(), "layers.*.*.w[o2]": Float8RowwiseParallel()},
}


def parallelized(model, mesh, plan):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some patterns are meant to match nothing
        return parallelize_module(model, mesh, plan)


def local_sizes(model):
    """fqn -> the (in_features, out_features) that torch left on this rank."""
    weights = {fqn: module.weight for fqn, module in linears(model).items()}
    local = {fqn: w.to_local() if isinstance(w, DTensor) else w for fqn, w in weights.items()}
    return {fqn: (w.shape[1], w.shape[0]) for fqn, w in local.items()}


def planned_sizes(model, plan):
    shards = Shards(Parallel(tp=TP, plan=plan), TOKENS)
    shapes = {fqn: shards.local_shape(fqn, m.in_features, m.out_features) for fqn, m in linears(model).items()}
    return {fqn: (shape.k, shape.n) for fqn, shape in shapes.items()}


@pytest.mark.parametrize("plan", [*PLANS.values(), *FLOAT8_PLANS.values()], ids=[*PLANS, *FLOAT8_PLANS])
def test_local_shapes_are_those_torch_cuts(mesh, plan):
    model = model_on()
    whole, planned = local_sizes(model), planned_sizes(model, plan)
    if plan in FLOAT8_PLANS.values():
        convert_to_float8_training(model)  # these styles are for float8 linears
    cut = local_sizes(parallelized(model, mesh, plan))
    assert planned == cut
    assert planned != whole
    in_sequence = {fqn for fqn, m in linears(model).items() if isinstance(m.weight, DTensor)} - {
        fqn for fqn in cut if cut[fqn] != whole[fqn]
    }
    assert in_sequence == ({"output"} if isinstance(plan.get("output"), SequenceParallel) else set())


def test_torch_takes_a_layer_once_so_only_our_plans_have_patterns_in_common(mesh):
    with pytest.raises(RuntimeError, match="only be called once"):
        parallelized(model_on(), mesh, {"out*": ColwiseParallel(), "output": RowwiseParallel()})


# --- patterns --------------------------------------------------------------------------------------------------


def shape_of(fqn, plan, *, tp=TP, cp=1, tokens=TOKENS, size=(DIM, HIDDEN)):
    shape = Shards(Parallel(tp=tp, cp=cp, plan=plan), tokens).local_shape(fqn, *size)
    return shape.m, shape.k, shape.n


WHOLE, COLWISE, ROWWISE = (64, 256, 512), (64, 256, 64), (64, 32, 512)


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ({"w*": "colwise", "w1": "rowwise"}, ROWWISE),
        ({"w1": "rowwise", "w*": "colwise"}, COLWISE),
        ({"w1": "rowwise", "w*": "replicated"}, ROWWISE),
        ({"w1": RowwiseParallel(), "*": PrepareModuleInput()}, ROWWISE),
        ({"w1": "replicated"}, WHOLE),
        ({"w2": "colwise"}, WHOLE),
    ],
)
def test_last_pattern_that_divides_counts(plan, expected):
    assert shape_of("w1", plan) == expected


@pytest.mark.parametrize(
    ("fqn", "expected"),
    [
        ("layers.0.w1", COLWISE),
        ("_orig_mod.layers.0.w1", COLWISE),
        ("layers.0._checkpoint_wrapped_module.w1", COLWISE),
        ("_fsdp_wrapped_module.layers.0._fsdp_wrapped_module._orig_mod.w1", COLWISE),
        ("layers.0.w1._orig_mod", COLWISE),
        ("layers.0.w1.base_layer", COLWISE),
        ("layers.0.inner.w1", WHOLE),
        ("model.layers.0.w1", WHOLE),
        ("layers.0.w1.w1", WHOLE),
        ("layers.0.W1", WHOLE),
        ("layers.w1", WHOLE),
        ("w1", WHOLE),
    ],
)
def test_wrappers_do_not_count_as_parts_and_other_names_do(fqn, expected):
    assert shape_of(fqn, {"layers.*.w1": "colwise"}) == expected


def test_plan_may_name_the_wrappers_too():
    """torch does not skip wrappers. A user who wraps modules first must write the wrappers into the plan."""
    plan = {"layers.*._checkpoint_wrapped_module.w1": "colwise"}
    assert shape_of("layers.0._checkpoint_wrapped_module.w1", plan) == COLWISE
    assert shape_of("layers.0._checkpoint_wrapped_module.w2", plan) == WHOLE


@pytest.mark.parametrize(("fqn", "plan"), [("", {"": "colwise"}), ("_orig_mod", {"": "colwise"})])
def test_model_that_is_one_linear(fqn, plan):
    assert shape_of(fqn, plan) == COLWISE
    assert shape_of(fqn, {"w1": "colwise"}) == WHOLE


# --- styles ----------------------------------------------------------------------------------------------------


class OwnColwise(ColwiseParallel):
    """A user's own style."""


EXPECTED_STYLE = (
    "expected ColwiseParallel, RowwiseParallel, SequenceParallel, a subclass, or one of the strings colwise, rowwise, "
    "sequence, replicated"
)


class DividesNobodyKnowsHow(ParallelStyle):
    def _apply(self, module, device_mesh):
        return module


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("colwise", COLWISE),
        ("colwise_gather_output", COLWISE),
        ("packed_colwise", COLWISE),
        (ColwiseParallel(), COLWISE),
        (Float8ColwiseParallel(), COLWISE),
        (OwnColwise(), COLWISE),
        ("rowwise", ROWWISE),
        ("rowwise_split_input", ROWWISE),
        (RowwiseParallel(), ROWWISE),
        (Float8RowwiseParallel(), ROWWISE),
        ("sequence", (8, 256, 512)),
        ("sequence_parallel", (8, 256, 512)),
        (SequenceParallel(), (8, 256, 512)),
        ("replicated", WHOLE),
        ("replicate", WHOLE),
        ("embedding_rowwise", WHOLE),
        ("moe_tp_experts", WHOLE),
        (PrepareModuleInput(), WHOLE),
        (PrepareModuleOutput(output_layouts=(), desired_output_layouts=()), WHOLE),
    ],
)
def test_style_says_what_is_divided(style, expected):
    assert shape_of("w1", {"w1": style}) == expected
    assert shape_of("w2", {"w1": style}) == WHOLE


@pytest.mark.parametrize(
    ("style", "complaint"),
    [
        ("Colwise", "expected a style such as colwise, rowwise, sequence, replicated; got 'Colwise'"),
        ("", "expected a style such as colwise, rowwise, sequence, replicated; got ''"),
        (ColwiseParallel, f"{EXPECTED_STYLE}; got <class"),
        (None, f"{EXPECTED_STYLE}; got None"),
        (nn.Linear(1, 1), f"{EXPECTED_STYLE}; got Linear"),
        pytest.param(DividesNobodyKnowsHow(), f"{EXPECTED_STYLE}; got <", id="a style of the user's own"),
    ],
)
def test_unknown_style_is_named_with_its_pattern(style, complaint):
    plan = {"layers.*": {"attention": {"wq": "colwise", "wk.proj": style}}}
    with pytest.raises(InputError) as error:
        Parallel(tp=2, plan=plan)
    assert str(error.value).startswith(f"parallel.plan['layers.*.attention.wk.proj']: {complaint}")


@pytest.mark.parametrize("plan", [ColwiseParallel(), None, ["w1"], 8])
def test_plan_that_is_no_mapping_is_an_error(plan):
    with pytest.raises(
        InputError, match=r"^parallel\.plan: expected a mapping or one of torchtitan, transformers; got"
    ):
        Parallel(tp=2, plan=plan)


# --- degrees ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tp", "cp"])
@pytest.mark.parametrize("degree", [0, -1, 2.0, "2", True, None])
def test_degree_out_of_range_is_named(name, degree):
    with pytest.raises(InputError, match=rf"^parallel\.{name}: expected a degree of at least 1; got {degree!r}$"):
        Parallel(**{name: degree, "plan": {"w1": "colwise"}})


@pytest.mark.parametrize("plan", [{}, {"layers": {}}])
def test_tensor_parallelism_without_a_plan_is_an_error(plan):
    with pytest.raises(InputError, match=r"^parallel\.plan: expected the plan that tp = 2 follows; got an empty one$"):
        Parallel(tp=2, plan=plan)
    assert shape_of("w1", plan, tp=1) == WHOLE


def test_unknown_ready_plan_is_an_error():
    complaint = r"^parallel\.plan: expected a mapping or one of torchtitan, transformers; got 'megatron'$"
    with pytest.raises(InputError, match=complaint):
        Parallel(tp=2, plan="megatron")


@pytest.mark.parametrize(("cp", "tokens", "m"), [(1, 64, 64), (2, 64, 32), (4, 64, 16), (3, 48, 16)])
def test_context_parallelism_divides_the_tokens(cp, tokens, m):
    assert shape_of("w1", {}, tp=1, cp=cp, tokens=tokens) == (m, 256, 512)
    assert shape_of("w1", {"w1": "colwise"}, cp=cp, tokens=tokens) == (m, 256, 64)


def test_sequence_and_context_parallelism_both_divide_the_tokens():
    assert shape_of("w1", {"w1": "sequence"}, tp=2, cp=4) == (8, 256, 512)


@pytest.mark.parametrize("cp", [3, 128])
def test_context_parallelism_that_does_not_divide_the_tokens_is_an_error(cp):
    with pytest.raises(InputError, match=rf"^parallel\.cp: expected a divisor of tokens = 64; got {cp}$"):
        Shards(Parallel(cp=cp), TOKENS)


@pytest.mark.parametrize(
    ("style", "shape", "complaint"),
    [
        ("colwise", (64, 256, 100), "tp = 8 does not divide n = 100 (colwise)"),
        ("rowwise", (64, 100, 256), "tp = 8 does not divide k = 100 (rowwise)"),
        ("sequence", (100, 256, 64), "tp = 8 does not divide m = 100 (sequence)"),
    ],
)
def test_degree_that_does_not_divide_is_named(style, shape, complaint):
    with pytest.raises(ShardError) as error:
        divided(style, TP, LinearShape(*shape))
    assert str(error.value) == complaint
    assert divided(style, 1, LinearShape(*shape)) == LinearShape(*shape)
    assert divided("replicated", TP, LinearShape(*shape)) == LinearShape(*shape)


# --- ready plans -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "colwise", "rowwise", "whole"),
    [
        (
            "torchtitan",
            ["layers.0.attention.wq", "layers.31.attention.wk", "layers.0.attention.qkv_linear.wkv", "output"],
            ["layers.0.attention.wo", "layers.7.feed_forward.w2"],
            ["layers.0.moe.router.gate", "layers.0.feed_forward", "tok_embeddings", "model.layers.0.attention.wq"],
        ),
        (
            "transformers",
            ["model.layers.0.self_attn.q_proj", "model.layers.79.mlp.gate_proj", "lm_head"],
            ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"],
            ["model.layers.0.mlp.gate", "layers.0.self_attn.q_proj", "score"],
        ),
    ],
)  # fmt: skip
def test_ready_plan_knows_the_names_of_a_llama(plan, colwise, rowwise, whole):
    assert {fqn: shape_of(fqn, plan) for fqn in (*colwise, *rowwise, *whole)} == {
        **dict.fromkeys(colwise, COLWISE),
        **dict.fromkeys(rowwise, ROWWISE),
        **dict.fromkeys(whole, WHOLE),
    }


@pytest.mark.parametrize("plan", READY_PLANS)
def test_ready_plan_divides_every_linear_of_a_block(plan):
    styles = [
        style for name, style in READY_PLANS[plan].items() if name.startswith(("layers.*.f", "model.layers.*.mlp"))
    ]
    assert sorted(style for style in styles if style != "replicated") == ["colwise", "colwise", "rowwise"]


# --- inside the filter -----------------------------------------------------------------------------------------


@pytest.fixture
def wants_float8(tmp_path):
    """A filter with these settings and a table in which 64 x 128 wins and 128 x 64 loses."""
    path = write_file(
        make_table(make_point(TOKENS, 64, 128, 2.0), make_point(TOKENS, 128, 64, 0.5)), tmp_path / "t.yaml"
    )

    def make(**settings):
        return auto_filter("rowwise", **{"tokens": TOKENS, "tables": path, "on_outside": "ignore", **settings})

    return make


def answers(asked):
    return {fqn: (d.shape and (d.m, d.k, d.n), d.convert) for fqn, d in asked.decisions.items()}


def test_decision_is_that_of_the_local_shape(wants_float8):
    layers = {"w1": nn.Linear(64, 1024), "w2": nn.Linear(1024, 64), "w3": nn.Linear(64, 128)}
    asked = wants_float8(parallel=Parallel(tp=8, plan={"w1": ColwiseParallel(), "w2": RowwiseParallel()}))
    assert [asked(layer, fqn) for fqn, layer in layers.items()] == [True, False, True]
    assert answers(asked) == {"w1": ((64, 64, 128), True), "w2": ((64, 128, 64), False), "w3": ((64, 64, 128), True)}


def test_decision_is_at_the_local_tokens(wants_float8):
    asked = wants_float8(tokens=256, parallel=Parallel(cp=4))
    assert asked(nn.Linear(64, 128), "w1")
    assert answers(asked) == {"w1": ((64, 64, 128), True)}
    assert asked.decisions["w1"].reason == "measured"


@pytest.mark.parametrize(
    ("tp", "size", "reason"),
    [
        (3, (64, 128), "tp = 3 does not divide n = 128 (colwise)"),
        (16, (64, 128), "n = 8: not a multiple of 16"),
        (2, (64, 16), "n = 8: not a multiple of 16"),
        (2, (64, 256), "measured"),
    ],
)
def test_local_part_that_float8_cannot_compute_is_refused(wants_float8, tp, size, reason):
    asked = wants_float8(parallel=Parallel(tp=tp, plan={"w1": "colwise"}))
    assert asked(nn.Linear(*size), "w1") is (reason == "measured")
    assert asked.decisions["w1"].reason == reason


def test_context_parallelism_is_refused_before_any_question(wants_float8):
    with pytest.raises(InputError, match=r"^parallel\.cp: expected a divisor of tokens = 64; got 5$"):
        wants_float8(parallel=Parallel(cp=5))


@pytest.mark.parametrize("parallel", [8, {"tp": 8}, None])
def test_parallel_that_is_none_is_named(wants_float8, parallel):
    with pytest.raises(InputError, match=r"^parallel: expected a fp8gate\.Parallel; got"):
        wants_float8(parallel=parallel)


# --- weights that are divided already --------------------------------------------------------------------------


class ThreeLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(64, 1024), nn.Linear(1024, 64), nn.Linear(64, 128)


def three_linears(device="meta"):
    with torch.device(device):
        return ThreeLinears()


PLAN = {"w1": ColwiseParallel(), "w2": RowwiseParallel()}
LOCAL = {"w1": ((64, 64, 128), True), "w2": ((64, 128, 64), False), "w3": ((64, 64, 128), True)}
GLOBAL = {"w1": ((64, 64, 1024), True), "w2": ((64, 1024, 64), False), "w3": ((64, 64, 128), True)}


@pytest.mark.parametrize("names", [("tp",), ("tensor_parallel",), ("model",), None])
@pytest.mark.parametrize("parallel", [Parallel(), Parallel(tp=TP, plan=PLAN)], ids=["no plan", "the same plan"])
def test_parallelized_weight_is_local_already(wants_float8, names, parallel):
    asked = wants_float8(parallel=parallel, on_unmatched="ignore")
    asked.check(parallelize_module(three_linears(), init_device_mesh("cpu", (TP,), mesh_dim_names=names), PLAN))
    assert answers(asked) == LOCAL


def test_plan_of_a_model_that_is_parallelized_is_no_unmatched_pattern(wants_float8, mesh):
    asked = wants_float8(parallel=Parallel(tp=TP, plan={**PLAN, "w9": ColwiseParallel()}))
    with pytest.warns(FilterWarning) as caught:
        asked.check(parallelize_module(three_linears(), mesh, PLAN))
    assert [str(w.message) for w in caught] == [
        "w3: no pattern of the parallel plan names it; taken as whole on every rank",
        "parallel.plan: w9 matched no linear",
    ]


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(tp=TP, plan=PLAN)], ids=["no plan", "a plan"])
@pytest.mark.parametrize("names", [None, ("fsdp",)])
def test_fully_sharded_weight_is_whole_where_it_is_used(wants_float8, parallel, names):
    model = three_linears("cpu")
    fully_shard(model, mesh=init_device_mesh("cpu", (TP,), mesh_dim_names=names))
    assert model.w1.weight.to_local().shape == (128, 64)
    asked = wants_float8(parallel=parallel)
    asked.check(model)
    assert answers(asked) == (LOCAL if parallel.tp > 1 else GLOBAL)


@pytest.mark.parametrize(
    ("names", "said"), [(("data", "model"), "'model'"), (("dp", "experts"), "'experts'"), (None, "1, without a name,")]
)
def test_mesh_of_which_nobody_says_what_it_divides_is_no_secret(wants_float8, names, said):
    both = init_device_mesh("cpu", (2, 4), mesh_dim_names=names)
    model = three_linears("cpu")
    weight = distribute_tensor(model.w1.weight, both, [Replicate(), Shard(0)])
    model.w1.weight = nn.Parameter(weight)
    asked = wants_float8()
    with pytest.warns(UnknownShardWarning) as caught:
        asked.check(model)
    assert [str(w.message) for w in caught] == [
        f"w1: mesh dimension {said} divides the weight: expected tp, or a name of data parallelism such as dp; "
        "taken as whole on every rank"
    ]
    assert asked.summary().endswith("; taken as whole on every rank, for want of a pattern: w1")
    with pytest.raises(UnknownShardWarning):
        wants_float8(strict=True).check(model)


def test_layer_that_transformers_has_divided_over_a_mesh_without_names_is_local(mesh):
    layer = nn.Linear(64, 1024, bias=False, device="cpu")
    mesh = init_device_mesh("cpu", (TP,))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight, mesh, [Shard(0)]))
    assert linear_size(layer).unknown
    layer._is_hooked = True
    assert linear_size(layer) == LinearSize(64, 128, is_local=True)


def test_container_is_no_match(wants_float8):
    """A pattern names the layer that is divided; the block around it divides nothing."""
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"w1": nn.Linear(64, 128)}), "norm": nn.LayerNorm(64)})
    plan = {"mlp": "colwise", "mlp.w1": "replicated", "norm": "sequence"}
    with pytest.warns(UnmatchedPatternWarning, match=r"^parallel\.plan: mlp matched no linear$") as caught:
        wants_float8(parallel=Parallel(tp=2, plan=plan)).check(model)
    assert len(caught) == 1


def test_norms_and_embeddings_are_missed_only_where_they_would_be_seen(wants_float8):
    plan = {"w1": "colwise", "norm": "sequence", "embed_tokens": "rowwise", "w9": "colwise"}
    pairs = [("w1", nn.Linear(64, 256))]
    for model, unmatched in ((pairs, 1), (nn.ModuleDict(dict(pairs)), 3)):
        with pytest.warns(UnmatchedPatternWarning) as caught:
            wants_float8(parallel=Parallel(tp=2, plan=plan)).check(model)
        assert len(caught) == unmatched


def test_fully_sharded_parts_of_a_parallelized_weight_are_its_local_part(wants_float8):
    both = init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(three_linears("cpu"), both["tp"], PLAN)
    fully_shard(model, mesh=both["dp"])
    assert model.w1.weight.to_local().shape == (128, 64)  # 1024 / 4 / 2
    assert linear_size(model.w1) == LinearSize(64, 256, is_local=True)
    assert linear_size(model.w2) == LinearSize(256, 64, is_local=True)
    assert linear_size(model.w3) == LinearSize(64, 128)


def test_hooks_of_dividing_need_no_finding_and_the_users_own_do(wants_float8):
    """torch hooks what it divides. If a model is converted after that, its forward fails, and is not silently wrong."""
    both = init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(three_linears("cpu"), both["tp"], PLAN)
    for linear in (model.w1, model.w3):
        fully_shard(linear, mesh=both["dp"])
    assert [len(linear._forward_hooks) for linear in (model.w1, model.w2, model.w3)] == [2, 1, 1]
    assert not any(linear_size(linear).refused for linear in (model.w1, model.w2, model.w3))
    model.w1.register_forward_hook(print)
    assert linear_size(model.w1).refused.startswith("conversion would drop its hooks, such as builtins.print")


def test_packed_weight_is_local_already(mesh):
    """transformers cuts a linear that is both the gate and the up projection into parts of each half."""
    layer = nn.Linear(64, 1024, device="meta")
    packed = distribute_tensor(layer.weight, mesh, [_StridedShard(0, split_factor=2)], src_data_rank=None)
    layer.weight = nn.Parameter(packed)
    assert layer.weight.to_local().shape == (128, 64)
    assert linear_size(layer) == LinearSize(64, 128, is_local=True)


def test_uneven_part_is_that_of_the_first_ranks(mesh):
    layer = nn.Linear(64, 1004, device="meta")
    assert linear_size(parallelize_module(layer, mesh, ColwiseParallel())) == LinearSize(64, 126, is_local=True)


# --- patterns that match nothing -------------------------------------------------------------------------------


def unmatched(asked, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [f.message for f in asked.check(model) if f.category is UnmatchedPatternWarning]


def test_plan_of_the_whole_model_matches(wants_float8):
    """Embeddings and norms are no linears, but the plan divides them too."""
    assert unmatched(wants_float8(parallel=Parallel(tp=TP, plan=WHOLE_MODEL)), model_on()) == []


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ({"output": "colwise", "layers.*.attention.wq": "colwise"}, []),
        ({"output": "colwise", "layers.*.wq": "colwise"}, ["parallel.plan: layers.*.wq matched no linear"]),
        ({"out": "rowwise", "output": "colwise"}, ["parallel.plan: out matched no linear"]),
        ({"layers": {"2": {"attention.wq": "colwise"}}}, ["parallel.plan: layers.2.attention.wq matched no linear"]),
        ({"output": "colwise", "nothing": "replicated"}, []),
        ("torchtitan", []),
        ("transformers", ["parallel.plan: any of the ready plan matched no linear"]),
    ],
)
def test_pattern_that_divides_nothing_is_reported(wants_float8, plan, expected):
    asked = wants_float8(parallel=Parallel(tp=TP, plan=plan))
    assert unmatched(asked, model_on()) == expected
    said = "patterns of the parallel plan that matched no linear" in asked.summary()
    assert said is bool(expected)
