"""Models as lists of linears."""

from __future__ import annotations

import json

import msgspec
import pytest

from fp8gate.filter.model.model_config import (
    BUNDLED,
    ModelConfig,
    ModelError,
    config_facts,
    linear_roles,
    load_model,
    not_linear,
)

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


def sizes(config: ModelConfig) -> dict[str, tuple[int, int, int]]:
    """role -> (count, in_features, out_features)."""
    return {role.role: (role.count, role.in_features, role.out_features) for role in linear_roles(config)}


@pytest.fixture
def write_config(tmp_path):
    def write(**fields) -> str:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))
        return str(path)

    return write


# --- bundled models --------------------------------------------------------------------------------------------

BUNDLED_SIZES = {
    "llama3-8b": {
        "wq": (32, 4096, 4096),
        "wk": (32, 4096, 1024),
        "wv": (32, 4096, 1024),
        "wo": (32, 4096, 4096),
        "w1": (32, 4096, 14336),
        "w3": (32, 4096, 14336),
        "w2": (32, 14336, 4096),
        "output": (1, 4096, 128256),
    },
    "llama3-70b": {
        "wq": (80, 8192, 8192),
        "wk": (80, 8192, 1024),
        "wv": (80, 8192, 1024),
        "wo": (80, 8192, 8192),
        "w1": (80, 8192, 28672),
        "w3": (80, 8192, 28672),
        "w2": (80, 28672, 8192),
        "output": (1, 8192, 128256),
    },
    "llama3-405b": {
        "wq": (126, 16384, 16384),
        "wk": (126, 16384, 1024),
        "wv": (126, 16384, 1024),
        "wo": (126, 16384, 16384),
        "w1": (126, 16384, 53248),
        "w3": (126, 16384, 53248),
        "w2": (126, 53248, 16384),
        "output": (1, 16384, 128256),
    },
    "qwen3-8b": {
        "wq": (36, 4096, 4096),
        "wk": (36, 4096, 1024),
        "wv": (36, 4096, 1024),
        "wo": (36, 4096, 4096),
        "w1": (36, 4096, 12288),
        "w3": (36, 4096, 12288),
        "w2": (36, 12288, 4096),
        "output": (1, 4096, 151936),
    },
    "mixtral-8x7b": {
        "wq": (32, 4096, 4096),
        "wk": (32, 4096, 1024),
        "wv": (32, 4096, 1024),
        "wo": (32, 4096, 4096),
        "output": (1, 4096, 32000),
    },
}


def test_every_bundled_model_is_checked():
    assert BUNDLED_SIZES.keys() == BUNDLED.keys()


@pytest.mark.parametrize("model", BUNDLED_SIZES)
def test_bundled_model_has_the_linears_of_its_config(model):
    assert sizes(load_model(model)) == BUNDLED_SIZES[model]
    assert list(sizes(load_model(model))) == list(BUNDLED_SIZES[model])


@pytest.mark.parametrize(
    ("model", "parameters", "vocabulary", "norms"),
    [
        ("llama3-8b", 8_030_261_248, 128256 * 4096, 65 * 4096),
        ("llama3-70b", 70_553_706_496, 128256 * 8192, 161 * 8192),
        ("llama3-405b", 405_853_388_800, 128256 * 16384, 253 * 16384),
        ("qwen3-8b", 8_190_735_360, 151936 * 4096, 73 * 4096 + 36 * 2 * 128),
    ],
)
def test_linears_and_embedding_and_norms_are_the_whole_model(model, parameters, vocabulary, norms):
    """The sum is compared with the parameter counts that the model cards publish."""
    weights = sum(count * k * n for count, k, n in sizes(load_model(model)).values())
    assert weights == parameters - vocabulary - norms


@pytest.mark.parametrize("model", BUNDLED)
def test_bundled_facts_are_exactly_the_fields_of_the_config(model):
    """A plan's hash of a block is computed from them, in this order."""
    fields = msgspec.structs.asdict(BUNDLED[model])
    assert list(config_facts(model).items()) == [(name, fact) for name, fact in fields.items() if fact is not None]


def test_facts_of_a_bundled_model_are_those_published():
    assert config_facts("qwen3-8b") == {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "vocab_size": 151936,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
    }


def test_unknown_name_is_no_bundled_model():
    assert "llama3-9b" not in BUNDLED
    with pytest.raises(KeyError):
        BUNDLED["llama3-9b"]


def test_roles_carry_hugging_face_names():
    assert [(role.role, role.fqn) for role in linear_roles(load_model("llama3-8b"))] == [
        ("wq", "model.layers.*.self_attn.q_proj"),
        ("wk", "model.layers.*.self_attn.k_proj"),
        ("wv", "model.layers.*.self_attn.v_proj"),
        ("wo", "model.layers.*.self_attn.o_proj"),
        ("w1", "model.layers.*.mlp.gate_proj"),
        ("w3", "model.layers.*.mlp.up_proj"),
        ("w2", "model.layers.*.mlp.down_proj"),
        ("output", "lm_head"),
    ]


def test_experts_are_said_to_be_no_linears():
    assert not_linear(load_model("mixtral-8x7b")).startswith("the 8 experts of each layer are grouped products")
    assert not_linear(load_model("llama3-8b")) is None


# --- config.json -----------------------------------------------------------------------------------------------


def test_config_is_read_and_other_fields_are_ignored(write_config):
    config = load_model(write_config(**LLAMA, rope_theta=500000.0, architectures=["LlamaForCausalLM"]))
    assert sizes(config) == {
        "wq": (3, 64, 64),
        "wk": (3, 64, 32),
        "wv": (3, 64, 32),
        "wo": (3, 64, 64),
        "w1": (3, 64, 160),
        "w3": (3, 64, 160),
        "w2": (3, 160, 64),
        "output": (1, 64, 256),
    }


def test_facts_are_everything_that_the_config_says(write_config):
    facts = {**LLAMA, "rope_theta": 500000.0, "architectures": ["LlamaForCausalLM"]}
    assert config_facts(write_config(**facts)) == facts


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_key_value_heads": ...}, {"wq": (3, 64, 64), "wk": (3, 64, 64), "wo": (3, 64, 64)}),
        ({"num_key_value_heads": 1}, {"wq": (3, 64, 64), "wk": (3, 64, 16), "wo": (3, 64, 64)}),
        ({"head_dim": 32}, {"wq": (3, 64, 128), "wk": (3, 64, 64), "wo": (3, 128, 64)}),
        ({"head_dim": None}, {"wq": (3, 64, 64), "wk": (3, 64, 32), "wo": (3, 64, 64)}),
    ],
)
def test_attention_sizes_follow_the_heads(write_config, fields, expected):
    config = load_model(write_config(**{**LLAMA, **fields}))
    assert {role: size for role, size in sizes(config).items() if role in expected} == expected


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_dense_types_have_the_same_linears(write_config, model_type):
    config = load_model(write_config(**{**LLAMA, "model_type": model_type}))
    assert list(sizes(config)) == ["wq", "wk", "wv", "wo", "w1", "w3", "w2", "output"]


def test_a_folder_stands_for_its_config(write_config, tmp_path):
    path = write_config(**LLAMA)
    assert load_model(str(tmp_path)) == load_model(path)
    assert config_facts(str(tmp_path)) == config_facts(path)


def test_a_folder_without_a_config_is_told_what_it_lacks(tmp_path):
    with pytest.raises(ModelError) as error:
        load_model(str(tmp_path))
    assert str(error.value) == (
        f"model: expected a config.json in the folder; {tmp_path / 'config.json'}: No such file or directory"
    )


@pytest.mark.parametrize("field", sorted(LLAMA.keys() - {"num_key_value_heads"}))
def test_missing_field_is_named(write_config, field):
    path = write_config(**{**LLAMA, field: ...})
    with pytest.raises(ModelError) as error:
        load_model(path)
    assert str(error.value).startswith(f"{path}: Object missing required field `{field}`")


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_size", "4096"), ("vocab_size", 1.5), ("num_hidden_layers", None), ("model_type", 3)]
)
def test_wrong_type_is_named(write_config, field, value):
    path = write_config(**{**LLAMA, field: value})
    with pytest.raises(ModelError) as error:
        load_model(path)
    assert str(error.value).startswith(f"{path}: Expected ")
    assert f"$.{field}" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"num_attention_heads": 128}, "$.num_attention_heads: expected a divisor of hidden_size, 64; found 128"),
        ({"num_attention_heads": 3}, "$.num_attention_heads: expected a divisor of hidden_size, 64; found 3"),
        ({"num_key_value_heads": 3}, "$.num_key_value_heads: expected a divisor of num_attention_heads, 4; found 3"),
        ({"num_key_value_heads": 8}, "$.num_key_value_heads: expected a divisor of num_attention_heads, 4; found 8"),
        ({"head_dim": 2**29}, "$.head_dim: expected at most 536870911 for 4 heads, found 536870912"),
        ({"vocab_size": 2**31}, "Expected `int` <= 2147483647 - at `$.vocab_size`"),
        ({"vocab_size": 10**320}, "$.vocab_size: expected a finite number, at most 9.22e+18 either way; found inf"),
        ({"rope_scaling": {"factor": float("inf")}}, "$.rope_scaling.factor: expected a finite number, at most"),
        ({"rope_scaling": {"beta": [1, float("nan")]}}, "$.rope_scaling.beta[1]: expected a finite number, at most"),
    ],
)
def test_sizes_that_do_not_go_together_are_named(write_config, fields, complaint):
    path = write_config(**{**LLAMA, **fields})
    with pytest.raises(ModelError) as error:
        load_model(path)
    assert str(error.value).startswith(f"{path}: {complaint}")


@pytest.mark.parametrize("fields", [{"num_attention_heads": 128, "head_dim": 1}, {"head_dim": 2**29 - 1}])
def test_any_head_dim_that_is_stated_goes_with_any_number_of_heads(write_config, fields):
    assert load_model(write_config(**{**LLAMA, **fields})).head_dim == fields["head_dim"]


@pytest.mark.parametrize("key", ["hidden_size", "x"])
def test_a_key_twice_is_named(tmp_path, key):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA)[:-1] + f', "y": {{"{key}": 1, "{key}": 1}}}}')
    with pytest.raises(ModelError, match=rf"config\.json: not plain JSON data: key '{key}' is there twice"):
        load_model(str(path))


@pytest.mark.parametrize(("depth", "is_read"), [(31, True), (32, False)])
def test_collections_inside_each_other_are_bounded(write_config, depth, is_read):
    nested: list = []
    for _ in range(depth - 1):
        nested = [nested]
    path = write_config(**LLAMA, text='a "[" in text: {[[\\', x=nested)
    if is_read:
        assert load_model(path).hidden_size == 64
    else:
        with pytest.raises(ModelError, match="expected at most 32 collections inside each other"):
            load_model(path)


@pytest.mark.parametrize("model_type", ["gpt2", "Llama", ""])
def test_unknown_model_type_is_named(write_config, model_type):
    path = write_config(**{**LLAMA, "model_type": model_type})
    with pytest.raises(ModelError) as error:
        load_model(path)
    assert str(error.value) == (
        f"{path}: $.model_type: expected one of llama, mistral, qwen2, qwen3, mixtral; found {model_type!r}"
    )


@pytest.mark.parametrize("content", ["", "{", "[]", "llama"])
def test_file_that_is_no_json_object_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    for read in (load_model, config_facts):
        with pytest.raises(ModelError, match=r"config\.json: "):
            read(str(path))


@pytest.mark.parametrize("model", ["llama3-9b", "LLAMA3-8B", ""])
def test_unknown_name_lists_the_bundled_models(model):
    for read in (load_model, config_facts):
        with pytest.raises(ModelError) as error:
            read(model)
        assert f"expected a config.json or one of {', '.join(BUNDLED)}; got {model!r}" in str(error.value)
