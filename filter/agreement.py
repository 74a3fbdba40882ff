"""Do all ranks convert the same layers? Over torch.distributed's store: any backend, bounded in time.

In: what one rank decided, a process group. Out: nothing, or an error on every rank that names the differences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MAX_NAMED = 5  # layers in an error; a model has hundreds


class RanksDisagreeError(RuntimeError):
    """Ranks would convert different layers, or by different tables; raised on all of them."""


class RanksMissingError(RuntimeError):
    """Ranks did not say in time what they decided."""


def require_agreement(decided: Mapping[str, Any], file: str, group: ProcessGroup | None, timeout_s: float) -> None:
    """Compare what this rank decided with every other rank of the group (None: all), which must call this too.

    decided: plain data, by topic; topics and the layers in `decided["layers"]` are named where ranks differ. file: its
    source; each node may have its own copy, so that alone is no difference.
    Raises RanksDisagreeError, RanksMissingError after `timeout_s` seconds, or ValueError without torch.distributed.
    """
    import hashlib
    import json

    import torch.distributed as dist

    if not dist.is_initialized():
        raise ValueError("agree: expected torch.distributed to be initialized; call it after init_process_group")
    if group is not None and not isinstance(group, dist.ProcessGroup):  # what new_group gives to other ranks
        raise ValueError("agree: expected a group that this rank belongs to")
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    board = _Board(ranks, dist.get_rank(), timeout_s)
    digest = hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()
    digests = board.exchange("digest", digest, ranks)
    speakers = {digest: rank for rank, digest in reversed(digests.items())}  # the first of those that agree
    if len(speakers) == 1:
        board.leave(ranks)  # for a rank that came late, the others may have given up
        return
    contents = board.exchange("content", json.dumps({**decided, "file": file}), sorted(speakers.values()))
    with contextlib.suppress(RanksMissingError):  # that they differ is the better error
        board.leave(ranks)
    raise RanksDisagreeError(_describe(digests, {rank: json.loads(text) for rank, text in contents.items()}))


class _Board:
    """Where every rank of a group can leave texts for the others."""

    def __init__(self, ranks: Sequence[int], rank: int, timeout_s: float) -> None:
        from hashlib import sha256

        from torch.distributed import distributed_c10d

        self._store = distributed_c10d._get_default_store()
        self._rank, self._timeout_s = rank, timeout_s
        group = sha256(str(sorted(ranks)).encode()).hexdigest()[:16]
        try:
            call = self._store.add(f"fp8gate/{group}/calls/{rank}", 1)  # ranks call in the same order
        except RuntimeError as error:
            raise _no_store(error) from error
        self._prefix = f"fp8gate/{group}/{call}"

    def exchange(self, topic: str, text: str, speakers: Sequence[int]) -> dict[int, str]:
        """Leave a text if this rank is one of the speakers, and read those of all speakers."""
        keys = [f"{self._prefix}/{topic}/{rank}" for rank in speakers]
        try:
            if self._rank in speakers:
                self._store.set(f"{self._prefix}/{topic}/{self._rank}", text)
            self._store.wait(keys, timedelta(seconds=self._timeout_s))
            return dict(zip(speakers, (t.decode() for t in self._store.multi_get(keys)), strict=True))
        except RuntimeError as error:
            raise self._missing(speakers, keys, error) from error

    def leave(self, ranks: Sequence[int]) -> None:
        """Wait until all have read: the store may be in this process, which an error may end.

        Raises RanksMissingError if some did not. A store that is gone was left by a rank that had read.
        """
        keys = [f"{self._prefix}/read/{rank}" for rank in ranks]
        try:
            self._store.set(f"{self._prefix}/read/{self._rank}", "")
            self._store.wait(keys, timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            try:
                late = self._without(ranks, keys)
            except RuntimeError:
                return
            if late:
                raise RanksMissingError(
                    f"rank {_list(late)} gave up before this rank answered, or did not read the answers within "
                    f"{self._timeout_s:g} s"
                ) from error

    def _missing(self, speakers: Sequence[int], keys: Sequence[str], error: RuntimeError) -> RanksMissingError:
        try:
            missing = self._without(speakers, keys)
        except RuntimeError:
            return _no_store(error)
        return RanksMissingError(f"rank {_list(missing)} did not answer within {self._timeout_s:g} s")

    def _without(self, ranks: Sequence[int], keys: Sequence[str]) -> list[int]:
        return [rank for rank, key in zip(ranks, keys, strict=True) if not self._store.check([key])]


def _no_store(error: RuntimeError) -> RanksMissingError:
    return RanksMissingError(f"the rank that keeps torch.distributed's store does not answer: {error}")


def _describe(digests: Mapping[int, str], contents: Mapping[int, Mapping[str, Any]]) -> str:
    """Who differs from whom, and in what: each group of ranks that agree against the first."""
    members = {rank: [r for r, d in digests.items() if d == digests[rank]] for rank in contents}
    first, *others = sorted(contents)
    lines = ["the ranks do not agree on what to convert:"]
    for other in others:
        lines.append(f"rank {_list(members[first])} against rank {_list(members[other])}:")
        lines += [f"  {difference}" for difference in _differences(contents[first], contents[other])]
    return "\n".join(lines)


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    for topic in one:
        if topic != "layers" and one[topic] != other[topic]:
            yield f"{topic}: {one[topic]} against {other[topic]}"
    layers, others = one["layers"], other["layers"]
    differ = [fqn for fqn in sorted({*layers, *others}) if layers.get(fqn) != others.get(fqn)]
    for fqn in differ[:MAX_NAMED]:
        yield f"{fqn}: {layers.get(fqn, 'not asked')} against {others.get(fqn, 'not asked')}"
    if len(differ) > MAX_NAMED:
        yield f"and {len(differ) - MAX_NAMED} more layers"


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
