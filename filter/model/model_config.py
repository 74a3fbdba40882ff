"""Models as lists of linear roles.

In: a Hugging Face config.json, or the name of a bundled one. Out: one `LinearRole` per kind of `nn.Linear` in the
model, with its count and sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Size
from fp8gate.filter.model.parallel import ShardError, Shards


class ModelError(InputError):
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
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearRole:
    """All linears of one kind in a model.

    role: Llama's short name for them, such as "wq". fqn: Hugging Face's name, with layer indices as *. count: how many
    there are. in_features, out_features: of the whole linear, before it is divided among ranks.
    """

    role: str
    fqn: str
    count: int
    in_features: int
    out_features: int


DENSE = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that have the same linears: they differ in biases and norms only."""
MIXTURE = ("mixtral",)
"""Model types whose experts are grouped products in transformers: they are no nn.Linear, so nothing converts them."""

Decoded = TypeVar("Decoded")


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
    """The config of a bundled model, by name, or of a config.json, by path.

    Raises ModelError if it is neither, or if the config lacks a field or is of a type whose linears are not known.
    """
    config = _decode(model, ModelConfig)
    if config.model_type not in (*DENSE, *MIXTURE):
        known = ", ".join((*DENSE, *MIXTURE))
        raise ModelError(f"{model}: $.model_type: expected one of {known}; found {config.model_type!r}")
    return config


def config_facts(model: str) -> dict[str, Any]:
    """Everything that the config.json of `load_model` says, as plain data.

    Raises ModelError if the model is neither bundled nor a file, or if the file holds no JSON object.
    """
    return _decode(model, dict[str, Any])


def _decode(model: str, wanted: type[Decoded]) -> Decoded:
    try:
        return msgspec.json.decode(_config_json(model), type=wanted)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{model}: {error}") from error


def _config_json(model: str) -> bytes:
    if model in BundledModels.names:
        from importlib import resources  # takes longer to import than all of fp8gate

        return (resources.files("fp8gate.filter.model") / "bundled" / f"{model}.json").read_bytes()
    try:
        return Path(model).read_bytes()
    except OSError as error:
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


def role_shape(linear: LinearRole, shards: Shards) -> LinearShape:
    """The shape of a role's linears on one rank. Raises ShardError, which names the linear, if it cannot be divided."""
    try:
        return shards.local_shape(linear.fqn, linear.in_features, linear.out_features)
    except ShardError as error:
        raise ShardError(f"{linear.fqn}: {error}") from error


def not_linear(config: ModelConfig) -> str | None:
    """A sentence about the model's products that are no `nn.Linear`, or None if there are none."""
    if config.num_local_experts is None:
        return None
    return (
        f"the {config.num_local_experts} experts of each layer are grouped products and the router is a plain "
        "parameter (transformers 5): no nn.Linear, so torchao leaves them in bf16 and they are not counted here"
    )
