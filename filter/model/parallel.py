"""The shape that one rank multiplies under tensor, sequence and context parallelism. Pure; needs no torch.

In: degrees, and the plan that `parallelize_module` is given. Out: local (m, k, n) by layer name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import msgspec

from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.names import plain_name, without_wrappers
from fp8gate.filter.contract.shapes import LinearShape

Style = Literal["colwise", "rowwise", "sequence", "replicated"]
"""Which dimension of a linear is divided by tp: out_features, in_features, the tokens, or none."""

PlanName = Literal["torchtitan", "transformers"]
READY_PLANS: dict[PlanName, dict[str, Style]] = {
    "torchtitan": {
        **dict.fromkeys((f"layers.*.attention.{name}" for name in ("wq", "wk", "wv")), "colwise"),
        **dict.fromkeys(
            (f"layers.*.attention.qkv_linear.{name}" for name in ("wq", "wk", "wv", "wkv", "wqkv")), "colwise"
        ),
        "layers.*.attention.wo": "rowwise",
        "layers.*.feed_forward.w1": "colwise",
        "layers.*.feed_forward.w3": "colwise",
        "layers.*.feed_forward.w2": "rowwise",
        "layers.*.moe.router.gate": "replicated",
        "output": "colwise",
        "lm_head": "colwise",
    },
    "transformers": {
        **dict.fromkeys((f"model.layers.*.self_attn.{name}_proj" for name in ("q", "k", "v")), "colwise"),
        "model.layers.*.self_attn.o_proj": "rowwise",
        "model.layers.*.mlp.gate_proj": "colwise",
        "model.layers.*.mlp.up_proj": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
        "model.layers.*.mlp.gate": "replicated",
        "lm_head": "colwise",
    },
}
"""Plans for Llama-style names. torchtitan's has the names of its modules and those of its config tree, where wk and wv
share `wkv`."""

_CLASSES: dict[str, Style] = {
    "ColwiseParallel": "colwise",
    "RowwiseParallel": "rowwise",
    "PackedColwiseParallel": "colwise",
    "PackedRowwiseParallel": "rowwise",
    "SequenceParallel": "sequence",
}
"""torch's classes, and those of transformers, which have the same names. Subclasses count too, such as torchao's
Float8ColwiseParallel."""
_REPLICATED = (
    *(
        "PrepareModuleInput",
        "PrepareModuleOutput",
        "PrepareModuleInputOutput",
        "PrepareFloat8ModuleInput",
        "NoParallel",
    ),
    *("AllReduceParallel", "ReplicatedWithGradAllReduce", "MlaKvAProjParallel"),
    *("MoeExpertsParallel", "MoeIdentityParallel", "MoeIdentityExpertParallel", "MoeTensorParalellExperts"),
    *("EmbeddingParallel", "LocalParamsParallel"),
)
"""Classes of torch, torchao, torchtitan and transformers that divide no linear's weight."""
_PLAIN = "TensorParallelLayer"
"""transformers' base class, which itself is the style "replicate". It says nothing about what its subclasses divide."""

_STRINGS: dict[str, Style] = {
    **dict.fromkeys(("colwise", "colwise_rep", "colwise_gather_output", "packed_colwise", "local_colwise"), "colwise"),
    **dict.fromkeys(("rowwise", "rowwise_rep", "rowwise_split_input", "packed_rowwise", "local_rowwise"), "rowwise"),
    **dict.fromkeys(("sequence", "sequence_parallel"), "sequence"),
    **dict.fromkeys(("replicated", "replicate", "replicated_with_grad_allreduce", "all_reduce"), "replicated"),
    **dict.fromkeys(("mla_kv_a_proj", "embedding_rowwise", "embedding_colwise", "local", "local_params"), "replicated"),
    **dict.fromkeys(("moe_tp_experts", "moe_identity_expert", "ep_dispatch_experts", "ep_router"), "replicated"),
    **dict.fromkeys(("grouped_gemm", "gather"), "replicated"),
}
"""fp8gate's own names, and the strings of a transformers tp_plan. Those for embeddings and experts divide no linear."""


class ShardError(InputError):
    """A layer that a degree does not divide; the message names the dimension."""


class Parallel(msgspec.Struct, frozen=True, kw_only=True):
    """How a model is divided among ranks. Data parallelism is left out, as it does not change shapes.

    tp: tensor parallel degree. plan: which layers it divides, and how. It is the mapping given to `parallelize_module`
    (fully qualified name pattern -> ColwiseParallel(), RowwiseParallel(), SequenceParallel(), a subclass of these, or
    for a submodule another such mapping), a transformers `tp_plan` of strings, or the name of a ready plan,
    "torchtitan" or "transformers". A linear that no pattern matches is taken as whole, with an UnknownShardWarning; the
    style "replicated" states that it is whole. cp: context parallel degree, which divides the tokens.

    Sequence parallelism changes nothing for the linears of such a plan: they gather their input first, or scatter their
    output, and multiply all tokens. Give a linear that works on the divided sequence the style "sequence".
    Raises InputError for a degree below 1, a tp without a plan, or an unknown style.
    """

    tp: int = 1
    cp: int = 1
    plan: Mapping[str, Any] | str = {}

    def __post_init__(self) -> None:
        for name in ("tp", "cp"):
            degree = getattr(self, name)
            if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
                raise InputError(f"parallel.{name}: expected a degree of at least 1; got {degree!r}")
        if self.tp > 1 and not self.patterns():
            raise InputError(f"parallel.plan: expected the plan that tp = {self.tp} follows; got an empty one")

    def patterns(self) -> list[Pattern]:
        """The plan as a flat list. If several patterns match a layer, the last one that divides it counts."""
        if isinstance(self.plan, Mapping):
            return list(_flatten(self.plan, ()))
        if not isinstance(self.plan, str) or self.plan not in READY_PLANS:
            raise InputError(f"parallel.plan: expected a mapping or one of {', '.join(READY_PLANS)}; got {self.plan!r}")
        return list(_flatten(READY_PLANS[self.plan], ()))


class Pattern(msgspec.Struct, frozen=True):
    """One entry of a plan. parts: of the name, each of which may contain wildcards."""

    parts: tuple[str, ...]
    style: Style

    def __str__(self) -> str:
        return ".".join(self.parts)

    @property
    def is_of_no_linear(self) -> bool:
        """Whether it names a norm, which has the style "sequence", or an embedding, which only its name tells."""
        return self.style == "sequence" or "embed" in self.parts[-1]

    def matches(self, names: Sequence[str]) -> bool:
        """Whether a name matches part by part, as `parallelize_module` matches it."""
        if len(names) != len(self.parts):
            return False
        for name, part in zip(names, self.parts, strict=True):
            if name != part and not fnmatchcase(name, part):
                return False
        return True


class OwnPlan(dict[str, Any]):
    """The `tp_plan` that a model of transformers brings along: what it does not name is whole on every rank.

    Its patterns may match nothing: the models of a family share them.
    """


def is_own_plan(model: Any, plan: Any) -> bool:
    """Whether a parallel plan is the one that a model of transformers brings along."""
    own = getattr(model, "tp_plan", None)
    return isinstance(own, Mapping) and isinstance(plan, Mapping) and bool(own) and dict(own) == dict(plan)


class Shards:
    """The local shapes under one `Parallel`. It remembers which patterns matched a name.

    tokens: batch x sequence of one microbatch, before context parallelism divides it. is_models_own: the plan is the
    model's own, see `OwnPlan`. Raises InputError if the context parallel degree does not divide the tokens.
    """

    def __init__(self, parallel: Parallel, tokens: int) -> None:
        if tokens % parallel.cp:
            raise InputError(f"parallel.cp: expected a divisor of tokens = {tokens}; got {parallel.cp}")
        self._tp, self._cp = parallel.tp, parallel.cp
        self._tokens = tokens // parallel.cp
        self._patterns = parallel.patterns()
        self._by_last: dict[str, list[Pattern]] = {}  # few patterns have the same last part as a name
        for pattern in self._patterns:
            self._by_last.setdefault(pattern.parts[-1], []).append(pattern)
        self._has_wild_last = any(sign in last for last in self._by_last for sign in "*?[")
        self._matched: set[Pattern] = set()
        self._is_ready_made = isinstance(parallel.plan, str)
        self._is_given_as_own = self.is_models_own = isinstance(parallel.plan, OwnPlan)

    def local_shape(self, fqn: str, in_features: int, out_features: int) -> LinearShape:
        """The part of the linear `fqn` that one rank multiplies. Raises ShardError if the degree does not divide it."""
        return self.part(self.style(fqn), in_features, out_features)

    def part(self, style: Style | None, in_features: int, out_features: int, rows: int | None = None) -> LinearShape:
        """A rank's part under this style; all of it under None. Raises ShardError if the degree does not divide it.

        rows: of the linear's input, before context parallelism divides them; None for the tokens.
        """
        local = self._tokens if rows is None else -(-rows // self._cp)
        return divided(style or "replicated", self._tp, LinearShape(local, in_features, out_features))

    @property
    def has_patterns(self) -> bool:
        return bool(self._patterns)

    def forget(self) -> None:
        """Prepare for another model: no pattern has matched, and the plan may be another model's."""
        self.is_models_own = self._is_given_as_own
        self._matched.clear()

    def unmatched(self, *, of_linears: bool) -> tuple[str, ...]:
        """The patterns that should divide a layer, but matched none.

        A ready plan has several names for each layer, so it is reported only if none of its patterns matched.
        of_linears: the caller asked about linears only, so patterns of norms and embeddings are left out.
        """
        if self.is_models_own:
            return ()
        dividing = [p for p in self._patterns if p.style != "replicated" and not (of_linears and p.is_of_no_linear)]
        if self._is_ready_made:
            return () if self._matched else ("any of the ready plan",)
        return tuple(str(p) for p in dividing if p not in self._matched)

    def style(self, fqn: str) -> Style | None:
        """The plan's style for this name, None if it has none. Remembers the patterns that match.

        Without tensor parallelism a name that the plan does not have is "replicated".
        """
        if not self._patterns:
            return "replicated"
        names = plain_name(fqn).split(".")
        style: Style | None = None if self._tp > 1 and not self.is_models_own else "replicated"
        for pattern in self._patterns if self._has_wild_last else self._by_last.get(names[-1], ()):
            if pattern.matches(names):
                self._matched.add(pattern)
                if pattern.style != "replicated" or style is None:
                    style = pattern.style
        return style


def divided(style: Style, tp: int, shape: LinearShape) -> LinearShape:
    """One rank's part of a linear. Raises ShardError if `tp` does not divide the dimension that `style` divides."""
    if style == "replicated" or tp == 1:
        return shape
    axis = {"colwise": "n", "rowwise": "k", "sequence": "m"}[style]
    size: int = getattr(shape, axis)
    if size % tp:
        raise ShardError(f"tp = {tp} does not divide {axis} = {size} ({style})")
    return msgspec.structs.replace(shape, **{axis: size // tp})


def _flatten(plan: Mapping[str, Any], prefix: tuple[str, ...]) -> Iterator[Pattern]:
    for name, style in plan.items():
        parts = (*prefix, *without_wrappers(name.split("."))) if name else prefix  # "" means the module itself
        if isinstance(style, Mapping):
            yield from _flatten(style, parts)
        else:
            yield Pattern(parts or ("",), _style_of(style, ".".join(parts)))


def _style_of(style: Any, pattern: str) -> Style:
    if isinstance(style, str):
        if style in _STRINGS:
            return _STRINGS[style]
        raise InputError(
            f"parallel.plan[{pattern!r}]: expected a style such as {', '.join(get_args(Style))}; got {style!r}"
        )
    ancestors = [cls.__name__ for cls in type(style).__mro__]
    known = [_CLASSES[name] for name in ancestors if name in _CLASSES]
    if known:
        return known[0]
    if ancestors[0] == _PLAIN or any(name in _REPLICATED for name in ancestors):
        return "replicated"
    raise InputError(
        f"parallel.plan[{pattern!r}]: expected ColwiseParallel, RowwiseParallel, SequenceParallel, a subclass, or one "
        f"of the strings {', '.join(get_args(Style))}; got {style!r}"
    )
