"""What a run's own config says of its model, its tokens, its parallelism and its recomputation.

In: the parts of torchtitan's config. Out: a `Run`, and errors for settings that are not the run's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.models.common.decoder import Decoder

from fp8gate.filter.contract.errors import InputError
from fp8gate.torchtitan.gate_settings import NAME, GateSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """tokens: rows of a linear's input on one data parallel rank in a microbatch, before context parallelism.

    tokens_from: the fields that they come from. checkpointing: the name of the policy. recompute: what it runs twice,
    None for a part of the forward. is_compiled: the model is compiled by Inductor. has_async_tp: the collectives of
    tensor parallelism overlap with products.
    """

    model: Any
    tokens: int
    tokens_from: str
    tp: int
    cp: int
    checkpointing: str
    recompute: Literal["none", "full"] | None
    is_compiled: bool
    has_async_tp: bool

    def recompute_for(self, settings: GateSettings) -> Literal["none", "full"]:
        """What to take as run twice: what the run says, else what the settings say, else nothing."""
        return self.recompute or settings.recompute or "none"

    def require_same(self, settings: GateSettings) -> None:
        """Raises InputError if a number that was given is not the run's."""
        degree = "parallelism.{}_parallel_degree".format
        own: Iterator[tuple[str, object, str]] = iter(
            (
                ("tokens", self.tokens, self.tokens_from),
                ("tp", self.tp, degree("tensor")),
                ("cp", self.cp, degree("context")),
                ("recompute", self.recompute, f"activation checkpointing, {self.checkpointing}"),
            )
        )
        for key, expected, source in own:
            given = getattr(settings, key)
            if None not in (given, expected) and given != expected:
                raise InputError(
                    f"{NAME}: {key}: expected {expected!r}, by the run's {source}; got {given!r}. "
                    "Leave the key out to take what the run says"
                )


def read_run(parts: Mapping[str, Any]) -> Run:
    """The run whose config has these parts. There is no activation_checkpoint where nothing is checkpointed.

    Raises InputError for a model that is not torchtitan's kind of language model.
    """
    missing = {"model", "training", "parallelism", "compile"} - parts.keys()
    if missing:
        raise InputError(f"{NAME}: torchtitan's config has no {', '.join(sorted(missing))}: expected that of 0.3.0")
    model, training, parallelism, compiling = (parts[name] for name in ("model", "training", "parallelism", "compile"))
    if not isinstance(model, Decoder.Config):
        raise InputError(f"{NAME}: expected the config of a language model, a Decoder.Config; got {_name(model)}")
    checkpointing = parts.get("activation_checkpoint")
    is_pipelined = parallelism.pipeline_parallel_degree > 1
    batch = parallelism.pipeline_parallel_microbatch_size if is_pipelined else training.local_batch_size
    batch_from = "parallelism.pipeline_parallel_microbatch_size" if is_pipelined else "training.local_batch_size"
    return Run(
        model=model,
        tokens=batch * training.seq_len,
        tokens_from=f"{batch_from} x training.seq_len = {batch} x {training.seq_len}",
        tp=parallelism.tensor_parallel_degree,
        cp=parallelism.context_parallel_degree,
        checkpointing="none" if checkpointing is None else _name(checkpointing).partition(".")[0],
        recompute=_recompute(checkpointing),
        is_compiled=compiling.enable and compiling.backend == "inductor" and "model" in compiling.components,
        has_async_tp=compiling.enable_async_tensor_parallel,
    )


def _recompute(checkpointing: object) -> Literal["none", "full"] | None:
    if checkpointing is None:
        return "none"
    return "full" if isinstance(checkpointing, FullAC.Config) else None


def _name(config: object) -> str:
    return type(config).__qualname__
