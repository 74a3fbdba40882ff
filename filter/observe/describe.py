"""Describe a model, whatever it is: a bundled one, a config.json, or linears that the user lists.

In: what stands on the command line. Out: a `DescribedModel`.
Try it: fp8gate explain google/config.json --recipe rowwise --tokens 8192 --device H200
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.reading.plain_values import MAX_SIZE
from fp8gate.filter.model.described_model import DescribedModel, LinearRole
from fp8gate.filter.model.model_config import (
    BundledModels,
    ModelConfig,
    config_facts,
    config_json,
    is_known_type,
    linear_roles,
    load_model,
    not_linear,
)
from fp8gate.filter.model.observed import Observation, ObservedLinear

_NO_JSON = re.compile(r"[:\[,]\s*-?(Infinity|NaN)\b")
"""Python writes these into a config.json, and JSON does not have them."""


def describe_model(model: str, tokens: int, *, linears: Sequence[str] = ()) -> DescribedModel:
    """The model's linears.

    model: a bundled name, a config.json, or its folder; with `linears` only a name. tokens: of one microbatch. linears:
    "NAME,IN_FEATURES,OUT_FEATURES,COUNT[,ROWS]". Llama-like models need no transformers, other types do.
    Raises ModelError for a model that is none of these, and InputError for a linear that cannot be read.
    """
    if linears:
        roles = tuple(map(_parse_linear, linears))
        seen = {name: ObservedLinear(calls=1, rows=role.rows or tokens) for role in roles for name in role.names}
        if len(seen) < sum(len(role.names) for role in roles):
            raise InputError("--linear: expected each NAME once; give linears of several sizes a name each")
        listed = Observation(seen)
        return DescribedModel(
            name=model or "listed linears",
            linears=roles,
            parallel_plan={},
            observation=listed,
            has_config=False,
        )
    if not _needs_transformers(model):
        config = load_model(model)
        return DescribedModel(
            name=model, linears=tuple(linear_roles(config)), heads=_heads(config), note=not_linear(config)
        )
    from fp8gate.filter.observe.transformers_model import describe_by_transformers

    return describe_by_transformers(model, config_json(model), tokens)


def _needs_transformers(model: str) -> bool:
    if model in BundledModels.names:
        return False
    return bool(_NO_JSON.search(config_json(model))) or not is_known_type(config_facts(model))


def _heads(config: ModelConfig) -> dict[str, int]:
    key_heads = config.num_key_value_heads or config.num_attention_heads
    return {"num_attention_heads": config.num_attention_heads, "num_key_value_heads": key_heads}


def _parse_linear(text: str) -> LinearRole:
    name, *numbers = (part.strip() for part in text.split(","))
    sizes = [int(number) for number in numbers if number.isdecimal() and 0 < int(number) <= MAX_SIZE]
    if not name or len(sizes) != len(numbers) or len(sizes) not in (3, 4):
        raise InputError(f"--linear: expected NAME,IN_FEATURES,OUT_FEATURES,COUNT[,ROWS]; got {text!r}")
    in_features, out_features, count, *rows = sizes
    fewest = rows[0] if rows else None
    return LinearRole(role=name, fqn=name, count=count, in_features=in_features, out_features=out_features, rows=fewest)
