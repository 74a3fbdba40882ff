"""Check that all ranks convert the same layers, over torch.distributed's store: with any backend, in bounded time.

In: what one rank decided, and a process group. Out: nothing, or an error on every rank that names the differences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fp8gate.filter.contract.errors import InputError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MAX_NAMED = 5  # layers that an error names; a model has hundreds


class RanksDisagreeError(RuntimeError):
    """The ranks would convert different layers, or decided by different tables. It is raised on all of them."""


class RanksMissingError(RuntimeError):
    """Some ranks did not say in time what they decided."""


def require_agreement(decided: Mapping[str, Any], file: str, group: ProcessGroup | None, timeout_s: float) -> None:
    """Compare what this rank decided with what all other ranks of the group decided. All of them must call this.

    decided: plain data by topic. If ranks differ, the error names the topics and the layers in `decided["layers"]`.
    file: where the table came from. Each node may have its own copy, so another file alone is no difference.
    group: None means all ranks.
    Raises RanksDisagreeError, or RanksMissingError after `timeout_s` seconds. Raises InputError if torch.distributed is
    not initialized, or for a group without this rank.
    """
    import hashlib
    import json

    import torch.distributed as dist

    if not dist.is_initialized():
        raise InputError("agree: expected torch.distributed to be initialized; call it after init_process_group")
    if group is not None and not isinstance(group, dist.ProcessGroup):  # new_group gives other ranks a placeholder
        raise InputError("agree: expected a group that this rank belongs to")
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    exchange = RankExchange(ranks, dist.get_rank(), timeout_s)
    digest = hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()
    digests = exchange.read_all("digest", digest, ranks)
    speakers = {digest: rank for rank, digest in reversed(digests.items())}  # the lowest rank of those that agree
    if len(speakers) == 1:
        exchange.wait_for_readers(ranks)  # a late rank may find that the others have given up
        return
    contents = exchange.read_all("content", json.dumps({**decided, "file": file}), sorted(speakers.values()))
    with contextlib.suppress(RanksMissingError):  # the disagreement is the more useful error
        exchange.wait_for_readers(ranks)
    raise RanksDisagreeError(_describe(digests, {rank: json.loads(text) for rank, text in contents.items()}))


class RankExchange:
    """Texts that the ranks of a group leave for each other in torch.distributed's store."""

    def __init__(self, ranks: Sequence[int], rank: int, timeout_s: float) -> None:
        from hashlib import sha256

        from torch.distributed import distributed_c10d

        self._store = distributed_c10d._get_default_store()
        self._rank, self._timeout_s = rank, timeout_s
        group = sha256(str(sorted(ranks)).encode()).hexdigest()[:16]
        try:
            call = self._store.add(f"fp8gate/{group}/calls/{rank}", 1)  # ranks make their calls in the same order
        except RuntimeError as error:
            raise _no_store(error) from error
        self._prefix = f"fp8gate/{group}/{call}"

    def read_all(self, topic: str, text: str, speakers: Sequence[int]) -> dict[int, str]:
        """The texts of all speakers: rank -> text. If this rank is a speaker, `text` is left for the others first.

        Raises RanksMissingError if a speaker leaves no text in time.
        """
        keys = [f"{self._prefix}/{topic}/{rank}" for rank in speakers]
        try:
            if self._rank in speakers:
                self._store.set(f"{self._prefix}/{topic}/{self._rank}", text)
            self._store.wait(keys, timedelta(seconds=self._timeout_s))
            return dict(zip(speakers, (t.decode() for t in self._store.multi_get(keys)), strict=True))
        except RuntimeError as error:
            raise self._missing(speakers, keys, error) from error

    def wait_for_readers(self, ranks: Sequence[int]) -> None:
        """Wait until all ranks have read everything: the store may be in this process, which an error may end.

        Raises RanksMissingError if some have not. If the store is gone, the rank that kept it had seen all others read.
        """
        keys = [f"{self._prefix}/read/{rank}" for rank in ranks]
        try:
            self._store.set(f"{self._prefix}/read/{self._rank}", "")
            self._store.wait(keys, timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            try:
                late = self._without_text(ranks, keys)
            except RuntimeError:
                return
            if late:
                raise RanksMissingError(
                    f"rank {_list(late)} gave up before this rank answered, or did not read the answers within "
                    f"{self._timeout_s:g} s"
                ) from error

    def _missing(self, speakers: Sequence[int], keys: Sequence[str], error: RuntimeError) -> RanksMissingError:
        try:
            missing = self._without_text(speakers, keys)
        except RuntimeError:
            return _no_store(error)
        return RanksMissingError(f"rank {_list(missing)} did not answer within {self._timeout_s:g} s")

    def _without_text(self, ranks: Sequence[int], keys: Sequence[str]) -> list[int]:
        return [rank for rank, key in zip(ranks, keys, strict=True) if not self._store.check([key])]


def _no_store(error: RuntimeError) -> RanksMissingError:
    return RanksMissingError(f"the rank that keeps torch.distributed's store does not answer: {error}")


def _describe(digests: Mapping[int, str], contents: Mapping[int, Mapping[str, Any]]) -> str:
    """Which ranks differ and in what. Ranks that agree form a group; each group is compared with the first."""
    members = {rank: [r for r, d in digests.items() if d == digests[rank]] for rank in contents}
    first, *others = sorted(contents)
    lines = ["the ranks do not agree on what to convert:"]
    for other in others:
        lines.append(f"rank {_list(members[first])} against rank {_list(members[other])}:")
        lines += [f"  {difference}" for difference in _differences(contents[first], contents[other])]
    return "\n".join(lines)


def _differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> Iterator[str]:
    for topic in left:
        if topic != "layers" and left[topic] != right[topic]:
            yield f"{topic}: {left[topic]} against {right[topic]}"
    left_layers, right_layers = left["layers"], right["layers"]
    differ = [fqn for fqn in sorted({*left_layers, *right_layers}) if left_layers.get(fqn) != right_layers.get(fqn)]
    for fqn in differ[:MAX_NAMED]:
        yield f"{fqn}: {left_layers.get(fqn, 'not asked')} against {right_layers.get(fqn, 'not asked')}"
    if len(differ) > MAX_NAMED:
        yield f"and {len(differ) - MAX_NAMED} more layers"


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
