"""What a user should know before trusting a filter's answers. Each kind has a warning category and a policy."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Literal, get_args

import msgspec

Policy = Literal["ignore", "warn", "error"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


class FilterWarning(UserWarning):
    """The base of all warnings of the filter. Where the policy is "error", the warning itself is raised."""


class StaleTableWarning(FilterWarning):
    """The table was measured with another torch, torchao, triton or driver than this machine has."""


class IncompleteTableWarning(FilterWarning):
    """The sweep of the table, or the search for the plan that decides, was stopped before its end.

    Shapes around points that the table lacks are judged by smaller ones. The plan's set is the best that was visited.
    """


class OutsideGridWarning(FilterWarning):
    """A layer's shape is outside of what was measured: the answer is that of the border."""


class AmbiguousPointWarning(FilterWarning):
    """The bounds of a layer's speedup leave the answer open, and being wrong may cost more than a tenth of its time."""


class MissingPointWarning(FilterWarning):
    """The point nearest to a layer's shape has no numbers: it failed, did not fit into memory, or was unstable."""


class NotPlainLinearWarning(FilterWarning):
    """A linear is left in bf16, as converting it would change what the model computes, or break it."""


class UnmeasuredSettingWarning(FilterWarning):
    """A setting of training changes what float8 costs, and was not measured."""


class UnknownRowsWarning(FilterWarning):
    """A linear is taken to multiply all tokens, which is doubtful."""


class UnknownShardWarning(FilterWarning):
    """Neither the parallel plan nor the weight says which part of a linear a rank holds."""


class PlanMismatchWarning(FilterWarning):
    """The plan does not know a linear of a block, or some blocks convert another set than the plan's."""


class UnmatchedPatternWarning(FilterWarning):
    """A pattern of `filter_fqns` or of the parallel plan matched no linear."""


class NothingConvertedWarning(FilterWarning):
    """No linear was converted."""


class Finding(msgspec.Struct, frozen=True):
    """One thing that the user should know."""

    category: type[FilterWarning]
    message: str


class Findings:
    """Findings, each once. `settle` warns of them or raises them, as the policy of their category says."""

    def __init__(self, policies: Mapping[type[FilterWarning], Policy]) -> None:
        self._policies = policies
        self._known: dict[Finding, None] = {}
        self._warned: set[Finding] = set()
        self._pending: list[Finding] = []

    def __iter__(self) -> Iterator[Finding]:
        return iter(dict.fromkeys((*self._known, *self._pending)))

    def add(self, finding: Finding) -> None:
        """Keep a finding for the next `settle`. An error is kept, and so raised, each time that it is added."""
        policy = self._policies[finding.category]
        is_new = finding not in self._pending and (policy == "error" or finding not in self._known)
        if policy != "ignore" and is_new:
            self._pending.append(finding)

    def forget(self, *, keep: tuple[type[FilterWarning], ...], but: Collection[Finding] = ()) -> None:
        """Prepare for another model: forget all findings but those of some categories. No warning is given twice.

        but: findings that are forgotten whatever their category.
        """
        self._known = {finding: None for finding in self._known if finding.category in keep and finding not in but}
        self._pending.clear()

    def settle(self, stacklevel: int = 3) -> None:
        """Warn of what was added since the last call, then raise all errors as one, with the first one's category.

        If Python turns a warning into an error, the rest waits for the next call.
        """
        if not self._pending:
            return
        errors = [finding for finding in self._pending if self._policies[finding.category] == "error"]
        self._pending = [finding for finding in self._pending if finding not in errors]
        while self._pending:
            finding = self._pending.pop(0)
            if finding not in self._warned:
                warnings.warn(finding.message, finding.category, stacklevel=stacklevel)
            self._warned.add(finding)
            self._known[finding] = None
        if errors:
            raise errors[0].category("\n".join(finding.message for finding in errors))
