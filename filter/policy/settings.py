"""The settings of a filter: everything that decides beside the table and the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import msgspec

from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.names import is_head, plain_name
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP
from fp8gate.filter.decision.lookup import DEFAULT_LOOKUP, LookupName
from fp8gate.filter.model.parallel import Parallel
from fp8gate.filter.model.rows import require_row_counts
from fp8gate.filter.policy.findings import (
    POLICIES,
    AmbiguousPointWarning,
    FilterWarning,
    IncompleteTableWarning,
    MissingPointWarning,
    NothingConvertedWarning,
    NotPlainLinearWarning,
    OutsideGridWarning,
    PlanMismatchWarning,
    Policy,
    StaleTableWarning,
    UnknownRowsWarning,
    UnknownShardWarning,
    UnmatchedPatternWarning,
    UnmeasuredSettingWarning,
)

NOT_PARALLEL = Parallel()

Recompute = Literal["none", "full"] | Callable[[str], bool]
"""The forwards that run twice because of activation checkpointing. "none": no forward. "full": all except that of the
head (`lm_head`, or `output` at the top level), which is outside of the checkpointed blocks. A predicate: the forwards
of the layers for whose name it is true."""


class FilterSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments of `auto_filter` that change decisions. Raises InputError for a value that is out of range."""

    tokens: int
    rows: dict[str, int] = {}
    filter_fqns: tuple[str, ...] = ()
    min_speedup: float | None = None
    lookup: LookupName = DEFAULT_LOOKUP
    parallel: Parallel = NOT_PARALLEL
    recompute: Recompute = "none"

    def __post_init__(self) -> None:
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 1:
            raise InputError(f"tokens: expected rows per microbatch, an integer of at least 1; got {self.tokens!r}")
        require_row_counts(self.rows)
        if self.min_speedup is not None and not self.min_speedup > 0:
            raise InputError(
                f"min_speedup: expected a ratio above 0, such as {DEFAULT_MIN_SPEEDUP}; got {self.min_speedup!r}"
            )
        if not isinstance(self.parallel, Parallel):
            raise InputError(f"parallel: expected a fp8gate.Parallel; got {self.parallel!r}")
        if self.recompute not in ("none", "full") and not callable(self.recompute):
            raise InputError(f"recompute: expected none, full or a predicate of names; got {self.recompute!r}")

    def leaves_out(self, fqn: str) -> bool:
        """Whether one of `filter_fqns` is in a linear's name."""
        return any(pattern in plain_name(fqn) for pattern in self.filter_fqns)

    def recomputes(self, fqn: str) -> bool:
        """Whether the forward of the linear of this name, without wrappers, runs twice."""
        if callable(self.recompute):
            return self.recompute(fqn)
        return self.recompute == "full" and not is_head(fqn)


POLICY_OF: dict[str, type[FilterWarning]] = {
    "on_stale": StaleTableWarning,
    "on_incomplete": IncompleteTableWarning,
    "on_outside": OutsideGridWarning,
    "on_ambiguous": AmbiguousPointWarning,
    "on_missing": MissingPointWarning,
    "on_unknown_shard": UnknownShardWarning,
    "on_unknown_rows": UnknownRowsWarning,
    "on_not_plain": NotPlainLinearWarning,
    "on_unmeasured": UnmeasuredSettingWarning,
    "on_plan": PlanMismatchWarning,
    "on_unmatched": UnmatchedPatternWarning,
    "on_nothing": NothingConvertedWarning,
}
"""The arguments of `auto_filter` that say what happens with each category of findings."""


def policies(default: Policy, asked: Mapping[str, Policy | None]) -> dict[type[FilterWarning], Policy]:
    """The policy of every category. asked: by the names of `POLICY_OF`; None, or no entry, means the default.

    Raises InputError, naming the argument, for an unknown policy.
    """
    for name, policy in asked.items():
        if policy is not None and policy not in POLICIES:
            raise InputError(f"{name}: expected one of {', '.join(POLICIES)}; got {policy!r}")
    return {category: asked.get(name) or default for name, category in POLICY_OF.items()}
