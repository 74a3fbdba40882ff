"""Which of the processes that torchrun started this one is.

In: the environment that torchrun (or another launcher of torch.distributed) sets. Out: a `Place`, or None.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fp8gate.filter.contract.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEnvironment:
    """rank of world in all, local_rank of local_world on this machine."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> RankEnvironment | None:
        """None if no launcher of torch.distributed has set it. Raises InputError if part of it is missing or wrong."""
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return None
        rank, world = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
        if "LOCAL_RANK" not in environment:
            raise InputError("LOCAL_RANK: expected beside RANK and WORLD_SIZE, as torchrun sets it; not set")
        local_rank, local_world = _number(environment, "LOCAL_RANK"), _number(environment, "LOCAL_WORLD_SIZE", world)
        if not (0 <= rank < world and 0 <= local_rank < local_world <= world):
            raise InputError(
                f"RANK, LOCAL_RANK: expected ranks below {world} and {local_world}; got {rank} and {local_rank}"
            )
        return cls(rank=rank, world=world, local_rank=local_rank, local_world=local_world)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise InputError(f"{name}: expected a number, as torchrun sets it; got {text!r}")
    return int(text)
