"""Check that all ranks decided the same layers by the same settings, with any backend, in bounded time.

In: what one rank decided, and a process group. Out: nothing, or an error on every rank that names the differences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.ranks.rank_exchange import RankExchange, RanksMissingError, listed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["RanksDisagreeError", "RanksMissingError", "Topic", "digest_of", "require_agreement"]

MAX_NAMED = 5  # layers that an error names; a model has hundreds
MAX_TIMEOUT_S = 7 * 86_400.0  # a week; clocks and locks overflow far above it
NOT_GIVEN = "not given"

Topic: TypeAlias = str | int | float | list[str] | dict[str, str]
"""What was decided by: a single setting, or one text for each layer or pattern."""


class RanksDisagreeError(RuntimeError):
    """The ranks would convert different layers, or decided by different tables. It is raised on all of them."""


def require_agreement(decided: Mapping[str, Topic], file: str, group: ProcessGroup | None, timeout_s: float) -> None:
    """Compare what this rank decided with what all other ranks of the group decided. All of them must call this.

    decided: see `topics_decided`. If ranks differ, the error names the topics and layers in which they do.
    file: where the table came from. Each node may have its own copy, so another file alone is no difference.
    group: None means all ranks.
    Raises RanksDisagreeError, or RanksMissingError within `timeout_s` + 4 seconds. Raises InputError for a timeout out
    of range, for a group without this rank, or if torch.distributed is not initialized.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    if not dist.is_initialized():
        raise InputError("agree: expected torch.distributed to be initialized; call it after init_process_group")
    if group is not None and not isinstance(group, dist.ProcessGroup):  # new_group gives other ranks a placeholder
        raise InputError("agree: expected a group that this rank belongs to")
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise InputError(f"timeout_s: expected seconds above 0 and at most {MAX_TIMEOUT_S:.0f}; got {timeout_s!r}")
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    exchange = RankExchange(distributed_c10d._get_default_store(), ranks, dist.get_rank(), timeout_s)
    exchange.run(lambda: _compare(exchange, decided, file))


def _compare(exchange: RankExchange, decided: Mapping[str, Topic], file: str) -> None:
    """Compare digests first. Only if some differ, one rank of each opinion tells the others all that it decided."""
    import json

    digests = exchange.join(sha256_of(json.dumps(decided, sort_keys=True)))
    speakers = {digest: rank for rank, digest in reversed(digests.items())}  # the lowest rank of those that agree
    if len(speakers) == 1:
        exchange.finish()  # a late rank may find that the others have given up
        return
    contents = exchange.read_all("content", json.dumps({"file": file, **decided}), sorted(speakers.values()))
    with contextlib.suppress(RanksMissingError):  # the disagreement is the more useful error
        exchange.finish()
    raise RanksDisagreeError(_describe(digests, {rank: json.loads(text) for rank, text in contents.items()}))


def _describe(digests: Mapping[int, str], contents: Mapping[int, Mapping[str, Any]]) -> str:
    """Which ranks differ and in what. Ranks that agree form a group; each group is compared with the first."""
    members = {rank: [r for r, d in digests.items() if d == digests[rank]] for rank in contents}
    first, *others = sorted(contents)
    lines = ["the ranks do not agree on what to convert:"]
    for other in others:
        lines.append(f"rank {listed(members[first])} against rank {listed(members[other])}:")
        lines += [f"  {difference}" for difference in differences(contents[first], contents[other])]
    return "\n".join(lines)


def differences(left: Mapping[str, Topic], right: Mapping[str, Topic]) -> Iterator[str]:
    """The topics in which two ranks differ, a line each; of layers and patterns the first few."""
    for topic in dict.fromkeys([*left, *right]):
        one, other = left.get(topic, NOT_GIVEN), right.get(topic, NOT_GIVEN)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _different_entries(one, other)
        elif one != other:
            yield f"{topic}: {one} against {other}"


def _different_entries(left: Mapping[str, str], right: Mapping[str, str]) -> Iterator[str]:
    differ = [name for name in sorted({*left, *right}) if left.get(name) != right.get(name)]
    for name in differ[:MAX_NAMED]:
        yield f"{name}: {left.get(name, NOT_GIVEN)} against {right.get(name, NOT_GIVEN)}"
    if len(differ) > MAX_NAMED:
        yield f"and {len(differ) - MAX_NAMED} more"


def digest_of(text: str) -> str:
    """What names a text in messages and in merged tables: "sha256 " and the first 12 digits."""
    return f"sha256 {sha256_of(text)[:12]}"


def sha256_of(text: str) -> str:
    from hashlib import sha256

    return sha256(text.encode()).hexdigest()
