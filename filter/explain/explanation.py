"""Explain what the filter would do to a model, and what that is worth. It needs a config and a table, but no GPU.

In: a `ModelConfig`, a `Table`, and how the model is divided. Out: an `Explanation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fp8gate.filter.contract.names import is_head
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Table, TableError
from fp8gate.filter.decision.decide import Decision, decide
from fp8gate.filter.decision.lookup import Lookup
from fp8gate.filter.decision.torchao_rule import torchao_converts
from fp8gate.filter.model.model_config import LinearRole, ModelConfig, linear_roles, not_linear, role_shape
from fp8gate.filter.model.parallel import Shards


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerExplanation:
    """One kind of linear: the shape that a rank holds, its decision, and its times.

    torchao: whether torchao's rule would convert it, None if torchao has no rule for the recipe.
    """

    linear: LinearRole
    shape: LinearShape
    decision: Decision
    torchao: bool | None
    bf16_us: float
    fp8_us: float

    def row(self) -> dict[str, Any]:
        """The row of the JSON output: names, local shape, answer and reason."""
        decision = self.decision
        return {
            "role": self.linear.role,
            "fqn": self.linear.fqn,
            "count": self.linear.count,
            "m": self.shape.m,
            "k": self.shape.k,
            "n": self.shape.n,
            "convert": decision.convert,
            "torchao_converts": self.torchao,
            "speedup": decision.speedup,
            "speedup_low": decision.speedup_low,
            "speedup_high": decision.speedup_high,
            "reason": decision.reason,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """Predicted times of all linears of a rank: forward + backward of one microbatch, in microseconds.

    They are sums of the table's times. What fusion in a compiled model adds or takes away is not in them.
    torchao_rule_us: None if torchao has no rule for the recipe.
    """

    bf16_us: float
    all_float8_us: float
    torchao_rule_us: float | None
    fp8gate_us: float

    def speedups(self) -> dict[str, float | None]:
        """The quotient of the bf16 sum and the sum of each choice."""
        torchao = self.torchao_rule_us
        return {
            "all_float8": self.bf16_us / self.all_float8_us,
            "torchao_rule": None if torchao is None else self.bf16_us / torchao,
            "fp8gate": self.bf16_us / self.fp8gate_us,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """The decisions and the predicted times of a model under one table. note: what they leave out, or None."""

    table: Table
    layers: list[LayerExplanation]
    predicted: Predicted
    note: str | None


def explain(
    config: ModelConfig, table: Table, lookup: Lookup, *, shards: Shards, recomputed: bool, min_speedup: float
) -> Explanation:
    """Decide every kind of linear of a model as one rank holds it, and sum the times of each choice.

    recomputed: every forward except the head's runs twice. Raises TableError if the table holds no number at all, and
    ShardError if a layer cannot be divided.
    """
    layers = [_explain_layer(linear, table, lookup, shards, recomputed, min_speedup) for linear in linear_roles(config)]
    notes = [note for note in (not_linear(config), _unknown_shards(config, shards)) if note]
    return Explanation(table=table, layers=layers, predicted=_predict(layers), note="; ".join(notes) or None)


def _unknown_shards(config: ModelConfig, shards: Shards) -> str | None:
    unknown = [linear.fqn for linear in linear_roles(config) if shards.style(linear.fqn) is None]
    return f"in no pattern of the parallel plan, taken as whole: {', '.join(unknown)}" if unknown else None


def _explain_layer(
    linear: LinearRole, table: Table, lookup: Lookup, shards: Shards, recomputed: bool, min_speedup: float
) -> LayerExplanation:
    shape = role_shape(linear, shards)
    recomputed = recomputed and not is_head(linear.fqn)
    estimate = lookup(shape)
    if estimate is None:
        raise TableError(f"{table.recipe} on {table.device.name}: $.points: expected a measured point, found none")
    if recomputed:
        estimate = estimate.recomputed()
    return LayerExplanation(
        linear=linear,
        shape=shape,
        decision=decide(shape, lookup, min_speedup=min_speedup, recomputed=recomputed),
        torchao=torchao_converts(table.recipe, in_features=linear.in_features, out_features=linear.out_features),
        bf16_us=estimate.bf16_us,
        # every choice leaves a layer in bf16 that float8 cannot compute
        fp8_us=estimate.bf16_us if shape.indivisible() else estimate.fp8_us,
    )


def _predict(layers: list[LayerExplanation]) -> Predicted:
    has_rule = all(layer.torchao is not None for layer in layers)
    return Predicted(
        bf16_us=_total(layers, [False] * len(layers)),
        all_float8_us=_total(layers, [True] * len(layers)),
        torchao_rule_us=_total(layers, [bool(layer.torchao) for layer in layers]) if has_rule else None,
        fp8gate_us=_total(layers, [layer.decision.convert for layer in layers]),
    )


def _total(layers: list[LayerExplanation], converted: list[bool]) -> float:
    return sum(
        layer.linear.count * (layer.fp8_us if convert else layer.bf16_us)
        for layer, convert in zip(layers, converted, strict=True)
    )
