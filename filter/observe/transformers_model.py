"""Describe any model of `transformers` by its config.json: built without memory, and observed in one forward.

In: a config.json, the tokens of a microbatch. Out: a `DescribedModel`: its linears with counts, sizes and rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from fp8gate.filter.contract.names import without_indices
from fp8gate.filter.model.described_model import DescribedModel, LinearRole
from fp8gate.filter.model.linear_layer import linears_of
from fp8gate.filter.model.model_config import ModelError
from fp8gate.filter.model.model_linears import grouped_weights, other_products
from fp8gate.filter.model.observed import Observation, ObservedLinear, ObserveError
from fp8gate.filter.model.parallel import OwnPlan
from fp8gate.filter.observe.observe import observe
from fp8gate.filter.observe.transformers_build import (
    HOW_ELSE,
    BuiltModel,
    build_model,
    microbatch,
    quiet_transformers,
    towers,
)


def describe_by_transformers(model: str, text: str, tokens: int) -> DescribedModel:
    """The model that the text of a config.json describes. model: what messages call it.

    Raises ModelError if transformers cannot build it, or if its forward cannot run without data.
    """
    built = build_model(model, text)
    with quiet_transformers():
        try:
            observation = observe_microbatch(built, tokens)
        except ObserveError as error:
            raise ModelError(f"{model}: {error}; {HOW_ELSE}") from error
    return DescribedModel(
        name=model,
        linears=tuple(_roles(built.module, observation)),
        parallel_plan=own_plan(built),
        observation=observation,
        heads=heads_of(built),
        note=_note(built),
    )


def observe_microbatch(built: BuiltModel, tokens: int) -> Observation:
    """What the linears of a model multiply: of its text, images or sound, and of those that a model of text also takes.

    Raises ObserveError if the forward cannot run without data.
    """
    seen = observe(built.module, microbatch(built.module, built.config, tokens))
    linears = dict(seen.linears)
    for name, tower in towers(built.module):
        if any(one.calls for fqn, one in linears.items() if fqn.startswith(f"{name}.")):
            continue
        with suppress(ObserveError):  # its linears are then ones that these inputs do not reach
            inner = observe(tower, microbatch(tower, tower.config, tokens))
            linears.update({f"{name}.{fqn}": one for fqn, one in inner.linears.items()})
    return Observation(linears)


def own_plan(built: BuiltModel) -> OwnPlan:
    """How the model is divided by tensor parallelism, by its own account; empty if it does not say."""
    return OwnPlan(getattr(built.module, "tp_plan", None) or {})


def _roles(module: Any, observation: Observation) -> Iterator[LinearRole]:
    """One role for all linears that differ in indices only, and have the same size and rows.

    Raises ModelError if the model has none that is called.
    """
    kinds: defaultdict[tuple[str, int, int, ObservedLinear], list[str]] = defaultdict(list)
    for fqn, linear in linears_of(module):
        kind = (without_indices(fqn), linear.in_features, linear.out_features, observation.linears[fqn])
        kinds[kind].append(fqn)
    if not any(seen.calls for *_, seen in kinds):
        raise ModelError(f"{type(module).__name__}: expected an nn.Linear that its forward calls; found none")
    for (fqn, in_features, out_features, seen), names in kinds.items():
        yield LinearRole(
            role=fqn.rpartition("*.")[2],
            fqn=fqn,
            count=len(names),
            in_features=in_features,
            out_features=out_features,
            rows=seen.rows,
            known_names=tuple(names),
        )


def heads_of(built: BuiltModel) -> dict[str, int]:
    """Field of the config -> heads of attention, which a degree of tensor parallelism must divide."""
    text = getattr(built.config, "text_config", None) or built.config
    fields = ("num_attention_heads", "num_key_value_heads")
    return {field: heads for field in fields if isinstance(heads := getattr(text, field, None), int)}


def _note(built: BuiltModel) -> str | None:
    notes = []
    if quantized := built.facts.get("quantization_config"):
        method = quantized.get("quant_method", "some method") if isinstance(quantized, dict) else "some method"
        notes.append(f"the checkpoint is quantized ({method}): this is about its linears in bf16")
    if others := (*grouped_weights(built.module), *other_products(built.module)):
        notes.append(f"no nn.Linear, left in bf16 and not counted here: {', '.join(dict.fromkeys(others))}")
    return "; ".join(notes) or None
