"""Models as lists of linear roles.

In: a Hugging Face config.json, or the name of a bundled one. Out: one `LinearRole` per kind of `nn.Linear` in the
model, with its count and sizes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from fp8gate.filter.contract.plain_yaml import convert
from fp8gate.filter.contract.reading.file_bytes import UnreadableError, read_utf8
from fp8gate.filter.contract.reading.json_data import MAX_BYTES, read_json
from fp8gate.filter.contract.reading.messages import FileError
from fp8gate.filter.contract.reading.plain_values import MAX_SIZE, require_plain_values
from fp8gate.filter.contract.table import Size
from fp8gate.filter.model.described_model import LinearRole


class ModelError(FileError):
    """A model that is not bundled, or a config that cannot be used; the message names the file and the field."""


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a Hugging Face config.json that fix a decoder's linear layers. Other fields are ignored."""

    model_type: str
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    vocab_size: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    num_local_experts: Size | None = None
    max_position_embeddings: Size | None = None

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.size_of_head

    @property
    def key_value_size(self) -> int:
        return (self.num_key_value_heads or self.num_attention_heads) * self.size_of_head

    @property
    def size_of_head(self) -> int:
        return self.head_dim or HEAD_DIM.get(self.model_type) or self.hidden_size // self.num_attention_heads


DENSE = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that have the same linears: they differ in biases and norms only."""
HEAD_DIM = {"qwen3": 128}
"""The size of a head where config.json has no head_dim and it is not hidden_size / num_attention_heads."""
CONFIG = "config.json"
MIXTURE = ("mixtral",)
"""Model types whose experts are grouped products in transformers: they are no nn.Linear, so nothing converts them."""


class BundledModels(Mapping[str, ModelConfig]):
    """The models that come with fp8gate: name -> config, read from filter/model/bundled/<name>.json when asked for.

    Each file holds the facts of the model's published config.json that `ModelConfig` has fields for.
    """

    names = ("llama3-8b", "llama3-70b", "llama3-405b", "qwen3-8b", "mixtral-8x7b")

    def __getitem__(self, name: str) -> ModelConfig:
        if name not in self.names:
            raise KeyError(name)
        return load_model(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


BUNDLED = BundledModels()


def load_model(model: str) -> ModelConfig:
    """The config of a bundled model, by name, or of a config.json, by its path or by that of its folder.

    Raises ModelError if it is none of these, if the config lacks a field, is of a type whose linears are not known, or
    has sizes that do not go together.
    """
    facts = config_facts(model)
    if isinstance(found := facts.get("model_type"), str) and found not in (*DENSE, *MIXTURE):
        known = ", ".join((*DENSE, *MIXTURE))
        raise ModelError(f"{model}: $.model_type: expected one of {known}; found {found!r}")
    config = convert(facts, ModelConfig, source=model, error=ModelError)
    if problem := _heads_problem(config):
        raise ModelError(f"{model}: {problem}")
    return config


def _heads_problem(config: ModelConfig) -> str | None:
    """What is wrong with the heads of attention: they have whole sizes, and each key serves as many queries."""
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    if config.head_dim is None and config.model_type not in HEAD_DIM and config.hidden_size % heads:
        return f"$.num_attention_heads: expected a divisor of hidden_size, {config.hidden_size}; found {heads}"
    if heads % key_heads:
        return f"$.num_key_value_heads: expected a divisor of num_attention_heads, {heads}; found {key_heads}"
    if config.query_size > MAX_SIZE:
        return f"$.head_dim: expected at most {MAX_SIZE // heads} for {heads} heads, found {config.size_of_head}"
    return None


def is_known_type(facts: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a language model whose linears are known without transformers."""
    architectures = facts.get("architectures") or ["LlamaForCausalLM"]
    is_causal = isinstance(architectures, list) and str(architectures[0]).endswith("ForCausalLM")
    return facts.get("model_type") in (*DENSE, *MIXTURE) and is_causal and not facts.get("quantization_config")


def config_facts(model: str) -> dict[str, Any]:
    """Everything that the config.json of `load_model` says, as plain data.

    Raises ModelError if the model is neither bundled nor a file, or if the file holds no JSON object.
    """
    text = config_json(model)
    try:
        data = read_json(text)
    except ValueError as cause:
        raise ModelError(f"{model}: not plain JSON data: {cause}") from cause
    require_plain_values(data, source=model, error=ModelError, on_one_line=False)
    return convert(data, dict[str, Any], source=model, error=ModelError)


def config_json(model: str) -> str:
    """The text of the config.json of `load_model`. Raises ModelError if there is none."""
    if model in BundledModels.names:
        from importlib import resources  # takes longer to import than all of fp8gate

        return (resources.files("fp8gate.filter.model") / "bundled" / f"{model}.json").read_text(encoding="utf-8")
    is_folder = os.path.isdir(model)
    path = os.path.join(model, CONFIG) if is_folder else model
    try:
        return read_utf8(path, at_most=MAX_BYTES)
    except UnreadableError as error:
        if is_folder:
            raise ModelError(f"model: expected a {CONFIG} in the folder; {path}: {error}") from error
        names = ", ".join(BUNDLED)
        raise ModelError(f"model: expected a config.json or one of {names}; got {model!r} ({error})") from error


def linear_roles(config: ModelConfig) -> list[LinearRole]:
    """Every kind of `nn.Linear` in the model, in forward order. `lm_head` is one, even if its weight is tied."""
    hidden, layer = config.hidden_size, "model.layers.*"
    roles: list[tuple[str, str, int, int]] = [
        ("wq", f"{layer}.self_attn.q_proj", hidden, config.query_size),
        ("wk", f"{layer}.self_attn.k_proj", hidden, config.key_value_size),
        ("wv", f"{layer}.self_attn.v_proj", hidden, config.key_value_size),
        ("wo", f"{layer}.self_attn.o_proj", config.query_size, hidden),
    ]
    if config.model_type in DENSE:
        roles += [
            ("w1", f"{layer}.mlp.gate_proj", hidden, config.intermediate_size),
            ("w3", f"{layer}.mlp.up_proj", hidden, config.intermediate_size),
            ("w2", f"{layer}.mlp.down_proj", config.intermediate_size, hidden),
        ]
    roles.append(("output", "lm_head", hidden, config.vocab_size))
    return [
        LinearRole(
            role=role,
            fqn=fqn,
            count=config.num_hidden_layers if fqn.startswith(layer) else 1,
            in_features=in_features,
            out_features=out_features,
        )
        for role, fqn, in_features, out_features in roles
    ]


def not_linear(config: ModelConfig) -> str | None:
    """A sentence about the model's products that are no `nn.Linear`, or None if there are none."""
    if config.num_local_experts is None:
        return None
    return (
        f"the {config.num_local_experts} experts of each layer are grouped products and the router is a plain "
        "parameter (transformers 5): no nn.Linear, so torchao leaves them in bf16 and they are not counted here"
    )
