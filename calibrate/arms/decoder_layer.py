"""A model's own decoder layer as a block: as `transformers` builds and calls it, with the sizes that one rank holds.

In: a model's config. Out: a `Blueprint`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fp8gate.calibrate.arms.blueprint import BlockError, Blueprint, by_name, linears_in
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.model.model_config import ModelConfig, linear_roles
from fp8gate.filter.model.parallel import Parallel, ShardError, Shards

LAYER = "model.layers.*."


def layer_blueprint(
    config: ModelConfig,
    facts: Mapping[str, Any],
    *,
    tokens: int,
    sequence: int,
    tp: int = 1,
    recomputed: bool = False,
) -> Blueprint:
    """The blueprint of a model's decoder layer as one rank of `tp` holds it, called as the model calls it.

    facts: the model's config.json. Raises BlockError if its linears are not those that the filter would see.
    """
    model = _one_layer(_local_facts(config, facts, tp))
    layer = model.layers[0]
    shapes = _layer_shapes(layer, config, tokens, tp)
    hidden = torch.zeros(tokens // sequence, sequence, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    return Blueprint.made(layer, _inputs_of_layer(model, hidden), shapes, recomputed, about=str(model.config))


def sequence_of(config: ModelConfig, tokens: int, asked: int | None) -> int:
    """Tokens of one sequence: as asked, else as many as the model takes.

    Raises BlockError if that does not divide the tokens.
    """
    sequence = asked or min(tokens, config.max_position_embeddings or tokens)
    if tokens % sequence:
        raise BlockError(f"sequence: expected a divisor of tokens = {tokens}; got {sequence}")
    return sequence


def _one_layer(facts: Mapping[str, Any]) -> Any:
    """The model with a single layer and a vocabulary of one token, on the meta device but for the positions."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(**facts)
    with torch.device("meta"):
        build: Callable[..., Any] = AutoModel.from_config
        model = build(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    model.rotary_emb = type(model.rotary_emb)(config=config)
    return model


def _local_facts(config: ModelConfig, facts: Mapping[str, Any], tp: int) -> dict[str, Any]:
    sizes = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads or config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
    }
    for name, size in sizes.items():
        if size % tp:
            raise BlockError(f"tp: expected a divisor of {name} = {size}; got {tp}")
    local = {name: size // tp for name, size in sizes.items()}
    one_layer = {"num_hidden_layers": 1, "vocab_size": 1, "head_dim": config.size_of_head}
    no_tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    without = ("layer_types", "quantization_config", "architectures")
    return {**{name: fact for name, fact in facts.items() if name not in without}, **local, **one_layer, **no_tokens}


def _layer_shapes(layer: nn.Module, config: ModelConfig, tokens: int, tp: int) -> dict[str, LinearShape]:
    """The shapes of the layer's linears. They must be those that the filter expects of the model."""
    shards = Shards(Parallel(tp=tp, plan="transformers"), tokens)
    try:
        expected = {
            linear.fqn.removeprefix(LAYER): shards.local_shape(linear.fqn, linear.in_features, linear.out_features)
            for linear in linear_roles(config)
            if linear.fqn.startswith(LAYER)
        }
    except ShardError as error:
        raise BlockError(f"tp: {error}") from error
    found = {name: LinearShape(tokens, linear.in_features, linear.out_features) for name, linear in linears_in(layer)}
    if found != expected:
        differ = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        name = differ[0]
        raise BlockError(f"{name}: expected {expected.get(name)} in the decoder layer, found {found.get(name)}")
    return found


class _Called(Exception):
    """The layer was called; the argument is what it was called with."""


def _inputs_of_layer(model: Any, hidden: Tensor) -> dict[str, Any]:
    """The arguments that the model calls its first layer with: positions, a mask if it needs one, no cache."""

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Called({**by_name(model.layers[0], args), **kwargs})

    hook = model.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(inputs_embeds=hidden, use_cache=False)
    except _Called as called:
        inputs: dict[str, Any] = called.args[0]
    else:
        raise BlockError("model: expected its layers to be called; they were not")
    finally:
        hook.remove()
    return {name: value for name, value in inputs.items() if value is not None}
