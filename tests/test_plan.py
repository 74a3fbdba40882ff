"""The plan file: what is written reads back equal, and nothing else is accepted."""

from __future__ import annotations

import msgspec
import pytest
from plans import CANDIDATES, make_plan

from fp8gate.filter.contract.names import block_role
from fp8gate.filter.contract.plans.layer_names import LayerNames, common_name, layers_pattern
from fp8gate.filter.contract.plans.plan import Candidate, PlanError
from fp8gate.filter.contract.plans.plan_file import format_plans, parse_plans, read_plan, read_plans, write_plans
from fp8gate.filter.contract.plans.role_names import RoleNames
from fp8gate.filter.contract.shapes import LinearShape


def parsed(text):
    return parse_plans(text, source="plan.yaml")[0]


def test_a_plan_reads_back_equal(tmp_path):
    path = tmp_path / "deep" / "plan.yaml"
    write_plans([make_plan()], path)
    assert read_plan(path) == make_plan()
    assert [file.name for file in path.parent.iterdir()] == ["plan.yaml"]


@pytest.mark.parametrize("fields", [{"table": None}, {"torchao": None}, {"convert": ()}, {"sequence": None, "tp": 8}])
def test_what_may_be_missing_reads_back_equal(fields):
    assert parsed(format_plans([make_plan(**fields)])) == make_plan(**fields)


def test_the_file_reads_well_in_a_diff():
    lines = format_plans([make_plan()]).splitlines()
    assert lines[:4] == ["schema: 1", "recipe: rowwise", "model: tiny", "tokens: 32"]
    assert "  self_attn.q_proj: [32, 64, 64]" in lines
    assert lines[-3:] == [
        "  - [[self_attn.q_proj], 7, 90.0, 180.0, 1.111, 1.1, 1.12, 1.05, 0.04, measured]",
        "  - [[mlp.gate_proj], 1, 100.0, 201.0, 0.9967, 0.9917, 1.002, 1.01, 0.03, measured]",
        "  - [[self_attn.q_proj, mlp.gate_proj], 0, null, null, null, null, null, 1.06, null, out_of_memory]",
    ]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("schema: 1", "schema: 2", r"\$.schema: expected 1, the version this fp8gate reads; found 2"),
        ("recipe: rowwise", "recipe: colwise", r"Invalid enum value 'colwise' - at `\$.recipe`"),
        ("tokens: 32", "tokens: 0", r"Expected `int` >= 1 - at `\$.tokens`"),
        ("model: tiny", "model: tiny\nmodel: big", "key 'model' is there twice"),
        ("model: tiny", "model: tiny\nextra: 1", "unknown field `extra`"),
        ("convert: [self_attn.q_proj]", "convert: [mlp.gate_proj]", r"\$.convert: expected a set above 1.0.* 0.9917"),
        ("convert: [self_attn.q_proj]", "convert: [self_attn.k_proj]", r"\$.convert: expected a set that was measured"),
        (
            "torchao: [self_attn.q_proj, ",
            "torchao: [self_attn.w, ",
            r"\$.torchao: expected roles of \$.shapes.*attn.w'",
        ),
        ("[[mlp.gate_proj], 1", "[[self_attn.q_proj], 1", r"candidates\[2\]: \['self_attn.q_proj'\] is there twice"),
        ("7, 90.0, 180.0", "7, 90.0, null", r"candidates\[1\].bwd_us: expected a finite number, as it was measured"),
        ("7, 90.0, 180.0", "7, 90.0, .inf", r"candidates\[1\]\[3\]: expected a finite number"),
        ("1.1, 1.12", "1.13, 1.12", r"candidates\[1\].speedup: expected low <= speedup <= high"),
        ("[convert, visits,", "[visits, convert,", r"\$.columns: expected"),
    ],
)
def test_anything_else_is_an_error_that_names_file_and_field(old, new, complaint):
    text = format_plans([make_plan()])
    assert text.count(old) >= 1
    with pytest.raises(PlanError, match=f"plan.yaml: .*{complaint}|plan.yaml: {complaint}"):
        parsed(text.replace(old, new, 1))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PlanError, match=r"none.yaml: cannot be read"):
        read_plan(tmp_path / "none.yaml")


def test_roles_in_another_order_are_refused():
    twisted = Candidate(("mlp.gate_proj", "self_attn.q_proj"), *msgspec.structs.astuple(CANDIDATES[1])[1:])
    with pytest.raises(PlanError, match="in the order of"):
        parsed(format_plans([make_plan(candidates=(*CANDIDATES[:2], twisted))]))


def test_a_plan_that_could_not_be_read_is_not_written(tmp_path):
    with pytest.raises(PlanError):
        write_plans([make_plan(convert=("mlp.gate_proj",))], tmp_path / "plan.yaml")
    assert list(tmp_path.iterdir()) == []


Q, K, V, GATE = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj"


@pytest.mark.parametrize(
    ("fqn", "place"),
    [
        ("model.layers.3.self_attn.q_proj", ("model.layers.3", (Q,))),
        ("layers.3.attention.wq", ("layers.3", (Q,))),
        ("layers.3.attention.qkv_linear.wk", ("layers.3", (K,))),
        ("layers.3._checkpoint_wrapped_module.feed_forward.w1", ("layers.3", (GATE,))),
        ("self_attn.q_proj", ("", (Q,))),
        ("layers.3.feed_forward.w2", ("layers.3", ())),
        ("layers.3.attention.qkv_linear.wqkv", ("layers.3", ())),
        ("layers.3.attention.qkv_linear.wkv", ("layers.3", ())),  # the plan has no v_proj
        ("layers.3.moe.shared_experts.gate_proj", ("layers.3", ())),
        ("layers.3.cross.self_attn.q_proj", ("layers.3", ())),
        ("decoder.layers.0.self_attn.q_proj", None),
        ("model.vision_tower.layers.0.self_attn.q_proj", None),
        ("model.language_model.layers.3.self_attn.q_proj", ("model.language_model.layers.3", (Q,))),
        ("language_model.model.layers.3.self_attn.q_proj", ("language_model.model.layers.3", (Q,))),
        ("lm_head", None),
        ("q_proj", None),
        ("other_self_attn.q_proj", None),
    ],
)
def test_only_a_role_in_a_numbered_layer_is_the_plans(fqn, place):
    assert make_plan().place(fqn) == place


def test_torchtitans_wkv_is_two_roles():
    plan = make_plan(shapes={Q: (32, 64, 64), K: (32, 64, 32), V: (32, 64, 32)})
    assert plan.place("layers.0.attention.qkv_linear.wkv") == ("layers.0", (K, V))
    assert make_plan(shapes={"attention.wkv": (32, 64, 32)}).place("layers.0.attention.wkv").roles == ("attention.wkv",)


def test_torchtitans_fused_wqkv_is_three_roles():
    shapes = {Q: (32, 64, 64), K: (32, 64, 32), V: (32, 64, 32)}
    place = make_plan(shapes=shapes).place("layers.0.attention.qkv_linear.wqkv")
    assert place == ("layers.0", (Q, K, V))
    assert make_plan(shapes={Q: (32, 64, 64)}).place("layers.0.attention.qkv_linear.wqkv").roles == ()


@pytest.mark.parametrize("role", ["self_attn.qkv_proj", "attention.wqkv", "attention.qkv_linear.wqkv"])
def test_a_plan_of_a_fused_role_knows_torchtitans(role):
    plan = make_plan(shapes={role: (32, 64, 128)})
    assert plan.place("layers.0.attention.qkv_linear.wqkv") == ("layers.0", (role,))
    assert plan.shapes_of((role,), is_fused=True) == {role: LinearShape(32, 64, 128)}


def test_a_fused_linear_is_as_wide_as_its_roles_together():
    plan = make_plan(shapes={Q: (32, 64, 64), K: (32, 64, 32), V: (32, 64, 32)})
    assert plan.shapes_of((Q, K, V), is_fused=True) == {Q: LinearShape(32, 64, 128)}
    assert plan.shapes_of((K, V), is_fused=False) == dict.fromkeys((K, V), LinearShape(32, 64, 32))


def test_roles_of_different_inputs_are_not_fused():
    plan = make_plan(shapes={Q: (32, 64, 64), K: (16, 64, 32)})
    assert list(plan.shapes_of((Q, K), is_fused=True)) == [Q, K]


def test_a_plan_of_torchtitans_names_knows_hugging_faces():
    plan = make_plan(shapes={"attention.wq": (32, 64, 64)})
    assert plan.place("model.layers.0.self_attn.q_proj") == ("model.layers.0", ("attention.wq",))
    assert plan.shape("attention.wq") == LinearShape(32, 64, 64)


def test_a_name_in_no_block_may_be_like_a_role():
    assert RoleNames(make_plan().shapes).alike("model.vision_tower.layers.0.self_attn.q_proj") == Q
    assert RoleNames(make_plan().shapes).alike("model.other_self_attn.q_proj") is None


# --- several kinds of layers -----------------------------------------------------------------------------------

DENSE, SPARSE = make_plan(layers="model.layers.0"), make_plan(layers="model.layers.1-3,5", convert=())


def test_the_kinds_of_a_models_layers_are_documents_of_one_file(tmp_path):
    path = tmp_path / "plan.yaml"
    write_plans([DENSE, SPARSE], path)
    assert read_plans(path) == (DENSE, SPARSE)
    assert path.read_text().count("\n---\nschema: 1\n") == 1
    with pytest.raises(PlanError, match="expected a plan of one kind of layers, found 2; read_plans reads them all"):
        read_plan(path)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"tokens": 64}, r"plan.yaml: \$.tokens: expected 32 as in the first document, found 64"),
        ({"recompute": "full"}, r"\$.recompute: expected none as in the first document, found full"),
        ({"layers": "model.layers.*"}, r"\$.layers: expected each layer in one document, found 'model.layers.0' and"),
        ({"layers": ""}, r"\$.layers: expected each layer in one document, found 'model.layers.0' and ''"),
        ({"layers": "layers.0-4"}, r"\$.layers: expected each layer in one document"),
    ],
)
def test_documents_that_do_not_go_together_are_an_error(fields, complaint):
    other = msgspec.structs.replace(SPARSE, **fields)
    with pytest.raises(PlanError, match=complaint):
        parse_plans(format_plans([DENSE, other]), source="plan.yaml")


def test_a_wrong_document_is_named_by_its_number():
    text = format_plans([DENSE, SPARSE]).replace("model.layers.1-3,5", "model.layers.x")
    with pytest.raises(PlanError, match=r"plan.yaml: document 2: .*regex.*\$.layers"):
        parse_plans(text, source="plan.yaml")


@pytest.mark.parametrize(
    "text", ["# a licence\n---\n{}", "---\n{}---\n", "{}---\n# the end\n", "{}--- # again\n# none\n"]
)
def test_what_says_nothing_is_no_document(text):
    assert parse_plans(text.format(format_plans([DENSE])), source="plan.yaml") == (DENSE,)


def test_an_empty_range_of_layers_is_an_error():
    with pytest.raises(PlanError, match=r"\$.layers: expected ranges from low to high; found 'model.layers.5-3'"):
        parsed(format_plans([make_plan(layers="model.layers.5-3")]))


def test_there_are_at_most_64_kinds():
    with pytest.raises(PlanError, match="expected at most 64 kinds of layers, found 65"):
        parse_plans("---\n".join(["schema: 1\n"] * 65), source="plan.yaml")


@pytest.mark.parametrize(
    ("pattern", "fqn", "found"),
    [
        ("model.layers.1-3,5", "model.layers.2.mlp.up_proj", ("model.layers.2", "mlp.up_proj")),
        ("model.layers.1-3,5", "layers.5.mlp.up_proj", ("layers.5", "mlp.up_proj")),
        ("model.layers.1-3,5", "model.language_model.layers.1.q", ("model.language_model.layers.1", "q")),
        ("model.layers.1-3,5", "model.layers.4.mlp.up_proj", None),
        ("model.layers.1-3,5", "model.layers.*.mlp.up_proj", None),
        ("model.layers.*", "model.layers.*.mlp.up_proj", ("model.layers.*", "mlp.up_proj")),
        ("model.layers.1-3,5", "model.vision_tower.encoder.layers.2.q", None),
        (
            "vision_tower.encoder.layers.*",
            "model.vision_tower.encoder.layers.2.q",
            ("model.vision_tower.encoder.layers.2", "q"),
        ),
        ("vision_tower.encoder.layers.*", "model.layers.2.q", None),
        ("transformer.h.0-11", "transformer.h.3.attn.c_attn", ("transformer.h.3", "attn.c_attn")),
        ("transformer.h.0-11", "h.3.attn.c_attn", ("h.3", "attn.c_attn")),
        ("transformer_blocks.*", "transformer_blocks.7.norm1.linear", ("transformer_blocks.7", "norm1.linear")),
        ("", "layers.7.q", ("layers.7", "q")),
        ("", "encoder.layers.7.q", None),
    ],
)
def test_a_layer_is_found_by_its_list_and_its_index(pattern, fqn, found):
    assert LayerNames(pattern).split(fqn) == found


@pytest.mark.parametrize(
    ("indices", "pattern"), [([0], "h.0"), ([2, 0, 1], "h.0-2"), ([0, 1, 3, 5, 6], "h.0-1,3,5-6"), ([9, 10], "h.9-10")]
)
def test_indices_are_written_as_ranges(indices, pattern):
    assert layers_pattern("h", indices) == pattern
    assert [i for i in range(20) if LayerNames(pattern).split(f"h.{i}.x")] == sorted(indices)


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (["h.0.q"], "h.0.q"),
        (["h.3.q", "h.1.q", "h.2.q"], "h.1-3.q"),
        (["h.0.q", "g.1.q"], None),
        (["h.0.q", "h.1.k"], None),
        (["h.0.q", "lm_head"], None),
        (["h.0.experts.1.q", "h.0.experts.2.q"], None),
    ],
)
def test_linears_that_differ_by_their_layer_have_one_name(names, name):
    assert common_name(names) == name


def test_a_bare_feed_forwards_roles_are_no_experts():
    plan = make_plan(shapes={"w1": (32, 64, 64)})
    assert plan.place("layers.0.moe.shared_experts.w1") == ("layers.0", ())
    assert plan.place("w1") == ("", ("w1",))


def test_a_role_has_no_layer_indices():
    assert block_role("layers.12.mlp.experts.3.w1") == "layers.mlp.experts.w1"
    assert block_role("layers.12.mlp.2") == "layers.mlp.2"
