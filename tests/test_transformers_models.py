"""Model types of transformers, built small: what is observed without data is what a real forward on the CPU shows."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from plans import TINY_CONFIG
from real_forward import rows_of_calls
from torch import nn
from typer.testing import CliRunner

from fp8gate import Parallel, UnknownShardWarning, UnmatchedPatternWarning, auto_filter
from fp8gate.cli import app
from fp8gate.filter.model.model_config import ModelError
from fp8gate.filter.observe.describe import describe_model
from fp8gate.filter.observe.observe import observe
from fp8gate.filter.observe.transformers_build import example_inputs

transformers = pytest.importorskip("transformers", minversion="5.0", reason="needs transformers")

TOKENS = 32
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "d_kv": 16,
    "vocab_size": 96,
    "embedding_size": 64,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_source_positions": 16,
    "max_target_positions": 64,
    "image_size": 32,
    "patch_size": 8,
    "pad_token_id": 0,
    "num_mel_bins": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
CAUSAL = [
    "apertus",
    "arcee",
    "bloom",
    "cohere",
    "cohere2",
    "codegen",
    "ernie4_5",
    "exaone4",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "granite",
    "granitemoe",
    "helium",
    "hunyuan_v1_dense",
    "llama",
    "minimax",
    "mistral",
    "mixtral",
    "mpt",
    "nemotron",
    "olmo",
    "olmo2",
    "olmoe",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
    "xglm",
]
OTHERS = {
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "bert": "BertForMaskedLM",
    "roberta": "RobertaForSequenceClassification",
    "distilbert": "DistilBertForMaskedLM",
    "electra": "ElectraForMaskedLM",
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassification",
    "whisper": "WhisperForConditionalGeneration",
}


def build(model_type, name=None, device="cpu"):
    """The smallest model of a type. Skips a type that this transformers does not have, or not so small."""
    try:
        config = transformers.AutoConfig.for_model(model_type)
        for field, value in SMALL.items():
            is_settable = not isinstance(getattr(type(config), field, None), property)
            if is_settable and (isinstance(getattr(config, field, None), int) or field == "pad_token_id"):
                setattr(config, field, value)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:2]
        with torch.device(device):
            return (
                getattr(transformers, name)(config) if name else transformers.AutoModelForCausalLM.from_config(config)
            )
    except (ValueError, AttributeError, KeyError, TypeError, ImportError) as error:
        pytest.skip(f"{model_type}: {type(error).__name__}: {error}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_type", "name"), [*((one, None) for one in CAUSAL), *OTHERS.items()], ids=[*CAUSAL, *OTHERS]
)
def test_what_is_observed_is_what_a_real_forward_does(model_type, name):
    model = build(model_type, name)
    inputs = example_inputs(model, model.config, TOKENS, samples=2)
    observed = observe(build(model_type, name, device="meta"), inputs).linears
    real = rows_of_calls(model, inputs)
    called = {fqn: seen.calls for fqn, seen in observed.items() if seen.calls}
    assert called == {fqn: len(rows) for fqn, rows in real.items()}
    known = {fqn: seen.rows for fqn, seen in observed.items() if seen.rows is not None}
    assert known == {fqn: min(rows) for fqn, rows in real.items() if fqn in known}
    assert {fqn for fqn in real if fqn not in known} <= {fqn for fqn in real if "expert" in fqn}


def config_file(folder, **facts):
    path = folder / "config.json"
    path.write_text(json.dumps(facts))
    return str(path)


DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 64,
    "vocab_size": 512,
    "quantization_config": {"quant_method": "fp8"},
}


def test_a_model_with_dense_first_layers_is_described(tmp_path):
    described = describe_model(config_file(tmp_path, **DEEPSEEK), TOKENS)
    kinds = {role.fqn: (role.count, role.in_features, role.out_features, role.rows) for role in described.linears}
    assert kinds["model.layers.*.mlp.gate_proj"] == (1, 256, 512, TOKENS)
    assert kinds["model.layers.*.mlp.shared_experts.gate_proj"] == (2, 256, 128, TOKENS)
    assert kinds["model.layers.*.self_attn.q_a_proj"] == (3, 256, 64, TOKENS)
    assert kinds["lm_head"] == (1, 256, 512, TOKENS)
    assert "the checkpoint is quantized (fp8)" in described.note
    assert "model.layers.*.mlp.experts" in described.note
    assert dict(described.heads) == {"num_attention_heads": 4, "num_key_value_heads": 4}


def test_the_class_that_architectures_names_is_described(tmp_path):
    path = config_file(tmp_path, **TINY_CONFIG, architectures=["LlamaForSequenceClassification"])
    fqns = [role.fqn for role in describe_model(path, TOKENS).linears]
    assert "score" in fqns
    assert "lm_head" not in fqns


def test_gpt2_has_a_head_and_products_that_are_no_linears(tmp_path):
    described = describe_model(config_file(tmp_path, model_type="gpt2", n_embd=768, n_layer=2), TOKENS)
    assert [(role.fqn, role.in_features) for role in described.linears] == [("lm_head", 768)]
    assert "transformer.h.*.attn.c_attn" in described.note


def test_heads_of_qwen3_have_128_sizes_unless_told(tmp_path):
    facts = {**TINY_CONFIG, "model_type": "qwen3", "hidden_size": 2048, "num_attention_heads": 32}
    sizes = {
        role.role: (role.in_features, role.out_features)
        for role in describe_model(config_file(tmp_path, **facts), 8).linears
    }
    assert (sizes["wq"], sizes["wo"], sizes["wk"]) == ((2048, 4096), (4096, 2048), (2048, 256))


def test_a_model_without_linears_is_an_error(tmp_path):
    with pytest.raises(ModelError, match=r"ResNetModel: expected an nn\.Linear that its forward calls; found none"):
        describe_model(config_file(tmp_path, model_type="resnet", architectures=["ResNetModel"]), TOKENS)


def test_infinity_in_a_config_is_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        '{"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "time_step_limit": [0.0, Infinity]}'
    )
    assert "backbone.layers.*.mixer.in_proj" in [role.fqn for role in describe_model(str(path), TOKENS).linears]


def test_images_are_as_many_as_come_nearest_to_the_tokens(tmp_path):
    facts = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
    }
    path = config_file(tmp_path, model_type="vit", patch_size=8, architectures=["ViTForImageClassification"], **facts)
    rows = {role.fqn: role.rows for role in describe_model(path, 17 * 30).linears}
    assert rows["vit.layers.*.mlp.fc1"] == 17 * 32
    assert rows["classifier"] == 32


@pytest.mark.parametrize(
    ("facts", "complaint"),
    [
        ({"model_type": "nonesuch"}, "transformers cannot read it, ValueError: Unrecognized model"),
        ({"model_type": "gpt2", "n_embd": "wide"}, "transformers cannot "),
        ({"model_type": "gpt2", "n_layer": 2, "num_hidden_layers": 10**6}, "expected at most 10000, found 1000000"),
    ],
)
def test_what_transformers_cannot_build_says_what_to_do(tmp_path, facts, complaint):
    with pytest.raises(ModelError) as caught:
        describe_model(config_file(tmp_path, **facts), TOKENS)
    assert complaint in str(caught.value)
    assert "10**6" in str(facts) or "--linear NAME" in str(caught.value) or "expected at most" in str(caught.value)


def test_the_rows_of_a_linear_with_a_star_are_those_of_every_layer():
    base = ["explain", "mine", "--recipe", "rowwise", "--tokens", "8192", "--device", "H200", "--json"]
    shown = json.loads(CliRunner().invoke(app, [*base, "--linear", "layers.*.expert,4096,14336,8,256"]).stdout)
    assert [(row["fqn"], row["count"], row["m"]) for row in shown["layers"]] == [("layers.*.expert", 8, 256)]
    assert not any("say rows=" in remark for remark in shown["remarks"])


def test_explain_takes_linears_from_the_command_line(tmp_path):
    base = ["explain", "mine", "--recipe", "rowwise", "--tokens", "8192", "--device", "H200", "--json"]
    sizes = ("q,4096,4096,32", "o,4096,4096,32", "expert,4096,14336,8,256")
    linears = [part for size in sizes for part in ("--linear", size)]
    shown = json.loads(CliRunner().invoke(app, [*base, *linears]).stdout)
    rows = {row["fqn"]: (row["count"], row["m"], row["k"], row["n"], row["convert"]) for row in shown["layers"]}
    assert rows == {
        "q": (32, 8192, 4096, 4096, True),  # at 1.04x: its name says that it shares its input
        "o": (32, 8192, 4096, 4096, False),
        "expert": (8, 256, 4096, 14336, False),
    }
    assert shown["note"] is None
    assert not any("fp8gate plan" in remark for remark in shown["remarks"])
    twice = CliRunner().invoke(app, [*base, "--linear", "q,64,64,1", "--linear", "q,64,64,1"])
    assert twice.stderr.startswith("fp8gate: --linear: expected each NAME once")
    nothing = CliRunner().invoke(app, ["explain", "--recipe", "rowwise", "--tokens", "8192", "--device", "H200"])
    assert (nothing.exit_code, nothing.stderr.startswith("fp8gate: MODEL: expected a config.json")) == (2, True)
    for wrong in ("q", "q,1,2", "q,1,2,3,4,5", "q,a,2,3", "q,0,2,3", ",1,2,3"):
        result = CliRunner().invoke(app, [*base, "--linear", wrong])
        assert (result.exit_code, result.stderr) == (
            2,
            f"fp8gate: --linear: expected NAME,IN_FEATURES,OUT_FEATURES,COUNT[,ROWS]; got {wrong!r}\n",
        )


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen3_moe", "gemma3_text", "glm4", "phi3"])
def test_a_models_own_parallel_plan_raises_no_warning_about_itself(model_type):
    model = build(model_type, device="meta")
    plan = model.tp_plan
    assert plan
    wants_float8 = auto_filter(
        "rowwise", tokens=8192, device="H200", parallel=Parallel(tp=2, plan=plan), on_stale="ignore"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        findings = wants_float8.check(model)
    about_itself = (UnknownShardWarning, UnmatchedPatternWarning)
    assert [finding.message for finding in findings if finding.category in about_itself] == []


def test_a_plan_is_a_models_own_for_that_model_only():
    model = build("llama", device="meta")
    parallel = Parallel(tp=2, plan=model.tp_plan)
    wants_float8 = auto_filter("rowwise", tokens=8192, device="H200", parallel=parallel, on_stale="ignore")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wants_float8.check(model)
        other = wants_float8.check(nn.ModuleDict({"other": nn.Linear(64, 64, device="meta")}))
    assert UnknownShardWarning in [finding.category for finding in other]


def test_another_plan_of_strings_is_doubted_as_before():
    model = build("llama", device="meta")
    plan = {**model.tp_plan, "model.layers.*.mlp.nobody": "colwise"}
    wants_float8 = auto_filter(
        "rowwise", tokens=8192, device="H200", parallel=Parallel(tp=2, plan=plan), on_stale="ignore"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        messages = [finding.message for finding in wants_float8.check(model)]
    assert "parallel.plan: model.layers.*.mlp.nobody matched no linear" in messages
