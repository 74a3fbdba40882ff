"""Models as lists of linear roles: from a Hugging Face config.json, or from a bundled name.

In: a config. Out: one `LinearRole` per kind of `nn.Linear` in the model, with its count and sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Size
from fp8gate.filter.model.parallel import ShardError, Shards


class ModelError(InputError):
    """A model that is not bundled, or a config that cannot be used; the message names the file and the field."""


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a Hugging Face config.json that fix a decoder's linear layers; others are ignored."""

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
    """All linears of one kind. role: Llama's short name. fqn: Hugging Face's, layer indices as *. Sizes unsharded."""

    role: str
    fqn: str
    count: int
    in_features: int
    out_features: int


DENSE = ("llama", "mistral", "qwen2", "qwen3")
"""Model types with bias or norm differences only: the same linears."""
MIXTURE = ("mixtral",)
"""Model types whose experts are grouped products in transformers: no nn.Linear, so nothing to convert."""

BUNDLED: dict[str, ModelConfig] = {
    "llama3-8b": ModelConfig(
        model_type="llama",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    ),
    "llama3-70b": ModelConfig(
        model_type="llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    ),
    "llama3-405b": ModelConfig(
        model_type="llama",
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
    ),
    "qwen3-8b": ModelConfig(
        model_type="qwen3",
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
    ),
    "mixtral-8x7b": ModelConfig(
        model_type="mixtral",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        vocab_size=32000,
        max_position_embeddings=32768,
    ),
}
"""The facts of the models' published config.json files."""


def load_model(model: str) -> ModelConfig:
    """A bundled model by name, or a config.json by path.

    Raises ModelError if it is neither, or if the config lacks a field or is of a type whose linears are not known.
    """
    if model in BUNDLED:
        return BUNDLED[model]
    try:
        content = Path(model).read_bytes()
    except OSError as error:
        names = ", ".join(BUNDLED)
        raise ModelError(f"model: expected a config.json or one of {names}; got {model!r} ({error})") from error
    try:
        config = msgspec.json.decode(content, type=ModelConfig)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{model}: {error}") from error
    if config.model_type not in (*DENSE, *MIXTURE):
        known = ", ".join((*DENSE, *MIXTURE))
        raise ModelError(f"{model}: $.model_type: expected one of {known}; found {config.model_type!r}")
    return config


def linear_roles(config: ModelConfig) -> list[LinearRole]:
    """Every kind of `nn.Linear` in the model, in forward order; `lm_head` too where its weight is tied."""
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
    """What a rank holds of a role. Raises ShardError, naming the role, if it cannot be divided."""
    try:
        return shards.local_shape(linear.fqn, linear.in_features, linear.out_features)
    except ShardError as error:
        raise ShardError(f"{linear.fqn}: {error}") from error


def not_linear(config: ModelConfig) -> str | None:
    """What of the model's products is no `nn.Linear`, for people, or None."""
    if config.num_local_experts is None:
        return None
    return (
        f"the {config.num_local_experts} experts of each layer are grouped products and the router is a plain "
        "parameter (transformers 5): no nn.Linear, so torchao leaves them in bf16 and they are not counted here"
    )
