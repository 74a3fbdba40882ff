"""The layers of a model as blocks: which are of one kind, what they are called with, what a rank holds of them."""

from __future__ import annotations

import json

import pytest
import torch
from plans import TINY_CONFIG, block_results

from fp8gate.calibrate.arms.block import Block
from fp8gate.calibrate.arms.blueprint import BlockError
from fp8gate.calibrate.device.cpu import CpuTimer
from fp8gate.calibrate.planning.subject import model_subjects, sequence_of
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.shapes import LinearShape

transformers = pytest.importorskip("transformers", minversion="5.0", reason="needs transformers")

CPU = torch.device("cpu")
TIMER = CpuTimer(2**16)
ATTENTION = {"self_attn.q_proj": 64, "self_attn.k_proj": 32, "self_attn.v_proj": 32, "self_attn.o_proj": 64}
SHAPES = {
    **{role: LinearShape(64, 64, n) for role, n in ATTENTION.items()},
    "mlp.gate_proj": LinearShape(64, 64, 128),
    "mlp.up_proj": LinearShape(64, 64, 128),
    "mlp.down_proj": LinearShape(64, 128, 64),
}
LOCAL_SHAPES = {
    "self_attn.q_proj": LinearShape(64, 64, 32),
    "self_attn.k_proj": LinearShape(64, 64, 16),
    "self_attn.v_proj": LinearShape(64, 64, 16),
    "self_attn.o_proj": LinearShape(64, 32, 64),
    "mlp.gate_proj": LinearShape(64, 64, 64),
    "mlp.up_proj": LinearShape(64, 64, 64),
    "mlp.down_proj": LinearShape(64, 64, 64),
}
MIXTURE = {"model_type": "mixtral", "num_local_experts": 4}
GLM = {
    "model_type": "glm4_moe",
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
GEMMA = {
    "model_type": "gemma3_text",
    "head_dim": 16,
    "num_hidden_layers": 4,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
GEMMA_THAT_SEES = {
    "model_type": "gemma3",
    "text_config": {**TINY_CONFIG, **GEMMA},
    "vision_config": VISION,
    "mm_tokens_per_image": 16,
}


@pytest.fixture
def subjects(tmp_path):
    """The kinds of layers of a tiny Llama with these fields, and what is not among them."""

    def subjects(fields=None, *, whole=None, **options):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(whole or {**TINY_CONFIG, **(fields or {})}))
        asked = {"tokens": 64, "sequence": None, "tp": 1, "recomputed": False, **options}
        return model_subjects(str(path), **asked)

    return subjects


@pytest.fixture
def blueprint(subjects):
    """Of the only kind of layers."""

    def blueprint(fields=None, **options):
        ((subject,), problems) = subjects(fields, **options)
        assert problems == []
        return subject.blueprint

    return blueprint


# --- one kind of layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tp", "shapes"), [(1, SHAPES), (2, LOCAL_SHAPES)])
def test_its_linears_are_those_a_rank_holds(blueprint, tp, shapes):
    assert blueprint(tp=tp).shapes == shapes


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3"])
def test_other_dense_architectures_have_the_same_roles(blueprint, model_type):
    found = blueprint({"model_type": model_type, "head_dim": 16})
    assert found.shapes == SHAPES
    assert 0.02 < block_results(found, SHAPES)[1] < 0.2


def test_the_biases_of_divided_linears_are_divided(blueprint):
    parameters = dict(blueprint({"model_type": "qwen2"}, tp=2).template.named_parameters())
    assert parameters["self_attn.q_proj.bias"].shape == (32,)
    assert "self_attn.o_proj.bias" not in parameters


@pytest.mark.parametrize("tp", [1, 2])
def test_experts_are_left_alone_and_divided(blueprint, tp):
    found = blueprint(MIXTURE, tp=tp)
    assert list(found.shapes) == list(ATTENTION)
    assert found.template.mlp.experts.gate_up_proj.shape == (4, 256 // tp, 64)
    assert found.template.mlp.experts.down_proj.shape == (4, 64, 128 // tp)
    assert block_results(found)[1] == 0.0


def test_it_is_called_as_its_model_calls_it(blueprint):
    """Causal, without a mask as no token is padded, with positions."""
    found = blueprint()
    assert found.inputs["hidden_states"].shape == (2, 32, 64)
    assert [one.shape for one in found.inputs["position_embeddings"]] == [(1, 32, 16)] * 2
    assert "attention_mask" not in found.inputs
    cos, _ = found.inputs["position_embeddings"]
    assert cos[0, 0, 0] == 1.0
    assert float(cos[0, 1, 0]) == pytest.approx(0.5403, abs=0.01)  # cos(1)
    torch.manual_seed(0)
    block = Block(found, CPU)
    arm = block.arm(found.ready(frozenset(), "rowwise", None, "cpu"))
    before = arm.forward().detach()
    with torch.no_grad():
        block.inputs["hidden_states"][:, -1] = 0
    after = arm.forward().detach()
    assert torch.equal(before[:, :-1], after[:, :-1])  # no token sees a later one
    assert not torch.equal(before[:, -1], after[:, -1])


def test_a_sliding_window_is_a_mask(blueprint):
    found = blueprint({"model_type": "mistral", "sliding_window": 8})
    assert found.inputs["attention_mask"].shape[-2:] == (32, 32)
    assert not found.inputs["attention_mask"][0, 0, 31, 8]
    assert found.inputs["attention_mask"][0, 0, 31, 30]
    assert block_results(found)[1] == 0.0


def test_all_of_a_list_are_named_without_their_number(subjects):
    ((subject,), _) = subjects()
    assert subject.layers == "model.layers.*"


@pytest.mark.parametrize(
    ("fields", "options", "complaint"),
    [
        ({}, {"tp": 4}, "tp: expected a divisor of num_key_value_heads = 2; got 4"),
        ({}, {"filter_fqns": ("layers.0.mlp",)}, r"leaves mlp.gate_proj out of some of model.layers.\* only"),
        ({"intermediate_size": 129}, {"tp": 2}, r"tp: model.layers.0.mlp.gate_proj: tp = 2 does not divide n = 129"),
        ({}, {"sequence": 24}, "sequence: expected a divisor of tokens = 64; got 24"),
    ],
)
def test_what_does_not_divide_is_an_error(subjects, fields, options, complaint):
    with pytest.raises(InputError, match=complaint):
        subjects(fields, **options)


def test_a_model_without_a_parallel_plan_is_not_divided(subjects):
    with pytest.raises(BlockError, match=r"tp: .* has no tensor parallel plan in transformers that divides its"):
        subjects(whole=VISION, tp=2)


def test_experts_that_a_degree_does_not_divide_are_an_error(subjects):
    fields = {**MIXTURE, "intermediate_size": 129, "num_key_value_heads": 4}
    with pytest.raises(BlockError, match=r"tp: model.layers.0.mlp.experts.gate_up_proj of shape \(4, 258, 64\) cannot"):
        subjects(fields, tp=4)


@pytest.mark.parametrize(("tokens", "asked", "sequence"), [(64, None, 32), (16, None, 16), (64, 8, 8), (64, 64, 64)])
def test_a_sequence_is_as_long_as_asked_or_as_the_model_takes(tokens, asked, sequence):
    assert sequence_of(32, tokens, asked) == sequence


def test_sequences_must_divide_the_tokens():
    with pytest.raises(BlockError, match="expected a divisor of tokens = 48; got 32, the most that the model takes"):
        sequence_of(32, 48, None)


def test_a_projection_after_attention_that_gives_nothing_is_seen(blueprint):
    """Attention averages over 1024 rows: of independent ones, so little would be left that nobody could tell."""
    found = blueprint({"max_position_embeddings": 1024}, tokens=1024)
    block = Block(found, CPU)
    ready = found.ready(frozenset(SHAPES), "rowwise", None, "cpu")
    arm = block.arm(ready)
    right = block.error(lambda: TIMER.results(arm))[0]
    projection = ready.module.self_attn.o_proj
    projection.register_forward_hook(lambda _, __, output: output - output.detach())
    wrong, name = block.error(lambda: TIMER.results(arm))
    assert (right < 0.2, wrong > 0.5, name) == (True, True, "output")


# --- several kinds of layers -----------------------------------------------------------------------------------


def test_dense_layers_before_experts_are_a_kind_of_their_own(subjects):
    (dense, sparse), problems = subjects(GLM)
    assert problems == []
    assert (dense.layers, sparse.layers) == ("model.layers.0", "model.layers.1-2")
    assert dense.blueprint.shapes == SHAPES
    assert [role for role in sparse.blueprint.shapes if role not in ATTENTION] == [
        f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")
    ]
    assert dense.blueprint.identity != sparse.blueprint.identity
    assert block_results(sparse.blueprint)[1] == 0.0


def test_what_a_router_decides_is_not_compared(subjects):
    """float8 sends some tokens to other experts: the gradients there say nothing about what it computes."""
    sizes = {
        "hidden_size": 256,
        "num_attention_heads": 8,
        "head_dim": 32,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
    }
    (_, sparse), _ = subjects({**GLM, **sizes, "max_position_embeddings": 512}, tokens=512)
    torch.manual_seed(0)
    block = Block(sparse.blueprint, CPU)
    left_out = {name for name, is_compared in zip(block._names, block._is_compared, strict=True) if not is_compared}
    assert "mlp.gate.weight" in left_out
    assert left_out <= {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


def test_full_and_sliding_attention_are_two_kinds(subjects):
    (sliding, full), _ = subjects(GEMMA)
    assert (sliding.layers, full.layers) == ("model.layers.0,2-3", "model.layers.1")
    assert sliding.blueprint.shapes == full.blueprint.shapes == SHAPES
    assert "attention_mask" in sliding.blueprint.inputs
    assert "attention_mask" not in full.blueprint.inputs
    assert sliding.blueprint.identity != full.blueprint.identity


def test_a_vision_tower_is_planned_beside_the_text(subjects):
    (tower, *text), problems = subjects(whole=GEMMA_THAT_SEES)
    assert problems == []
    assert tower.layers.endswith("vision_tower.encoder.layers.*")
    assert tower.sequence is None
    assert [one.layers.rpartition(".")[2] for one in text] == ["0,2-3", "1"]
    assert {shape.m for shape in text[0].blueprint.shapes.values()} == {64}
    assert {shape.k for role, shape in tower.blueprint.shapes.items() if "attn" in role} == {32}
    assert block_results(tower.blueprint, tower.blueprint.shapes)[1] < 0.2


def test_encoder_and_decoder_are_two_lists_and_the_first_of_each_computes_the_positions(subjects):
    facts = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 3, "num_heads": 2}
    found, problems = subjects(whole={**facts, "vocab_size": 100, "n_positions": 32})
    assert problems == []
    assert [one.layers for one in found] == [
        "encoder.block.0",
        "encoder.block.1-2",
        "decoder.block.0",
        "decoder.block.1-2",
    ]
    cross = found[2].blueprint.inputs["encoder_hidden_states"]
    assert cross.requires_grad
    assert block_results(found[3].blueprint)[1] == 0.0


def test_a_model_that_hears_is_called_once(subjects):
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
    ffn = {"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 100}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
    positions = {"max_source_positions": 32, "max_target_positions": 32, "num_mel_bins": 16}
    architecture = {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}
    found, problems = subjects(whole={**architecture, **sizes, **ffn, **tokens, **positions})
    assert (problems, [one.layers for one in found]) == ([], ["model.encoder.layers.*", "model.decoder.layers.*"])


def test_what_is_left_out_as_a_whole_is_said_and_the_others_are_planned(subjects):
    found, problems = subjects(whole=GEMMA_THAT_SEES, filter_fqns=("vision_tower",))
    assert [one.layers.rpartition(".")[2] for one in found] == ["0,2-3", "1"]
    (problem,) = problems
    assert problem.endswith("no linear that may be converted: left out, or no multiples of 16")
    with pytest.raises(BlockError, match=r"no layer of it can be planned: model.layers.\*: no linear that may be"):
        subjects(filter_fqns=("layers",))


def test_a_model_whose_layers_have_no_linear_is_an_error(subjects):
    with pytest.raises(BlockError, match=r"expected a list of layers with an nn\.Linear in them; found none"):
        subjects(whole={"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32})


def test_layers_that_cannot_run_are_said_with_the_way_out(subjects, monkeypatch):
    from transformers.models.llama import modeling_llama

    def fails(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", fails)
    with pytest.raises(BlockError, match=r"model.layers: RuntimeError: no such kernel. But any block can be"):
        subjects()
