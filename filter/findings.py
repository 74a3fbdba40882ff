"""What a user should know before trusting a filter's answers: a warning category each, any of which can be an error."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import msgspec

Policy = Literal["ignore", "warn", "error"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


class FilterWarning(UserWarning):
    """Every warning of the filter; raised as what it is where it is an error."""


class StaleTableWarning(FilterWarning):
    """The table was measured with another torch, torchao, triton or driver than is here."""


class OutsideGridWarning(FilterWarning):
    """A layer's shape lies outside what was measured: the answer is that of the border."""


class AmbiguousPointWarning(FilterWarning):
    """The point nearest to a layer's shape could not be told from 1.0."""


class MissingPointWarning(FilterWarning):
    """The point nearest to a layer's shape has no number: it failed, did not fit into memory, or was unstable."""


class UnknownShardWarning(FilterWarning):
    """Neither the parallel plan nor a linear's weight says what a rank holds of it."""


class PlanMismatchWarning(FilterWarning):
    """A plan does not know a linear of a block, or blocks convert another set than the one that it measured."""


class UnmatchedPatternWarning(FilterWarning):
    """A pattern of `filter_fqns` or of the parallel plan matched no linear."""


class NothingConvertedWarning(FilterWarning):
    """No linear was converted."""


class Finding(msgspec.Struct, frozen=True):
    """One thing to know."""

    category: type[FilterWarning]
    message: str


class Findings:
    """What was found, each once, and dealt with as the category's policy says."""

    def __init__(self, policies: Mapping[type[FilterWarning], Policy]) -> None:
        self._policies = policies
        self._known: dict[Finding, None] = {}
        self._warned: set[Finding] = set()
        self._pending: list[Finding] = []

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._known)

    def add(self, finding: Finding) -> None:
        """Note a finding, to be dealt with by `settle`. An error is raised as often as it is found."""
        policy = self._policies[finding.category]
        is_new = finding not in self._pending and (policy == "error" or finding not in self._known)
        if policy != "ignore" and is_new:
            self._pending.append(finding)

    def forget(self, *, but: type[FilterWarning]) -> None:
        """Start anew with another model: only findings of this category are still known. None is warned of twice."""
        self._known = {finding: None for finding in self._known if finding.category is but}
        self._pending.clear()

    def settle(self, stacklevel: int = 3) -> None:
        """Warn of what was added since the last time, then raise all errors as one, of the first one's category.

        Where Python makes the first warning an error, the others await the next call.
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
