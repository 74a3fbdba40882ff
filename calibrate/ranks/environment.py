"""Where this process stands among those that torchrun started, and which GPU is its own.

In: the environment that torchrun (or another launcher of torch.distributed) sets. Out: a `Place`, or None.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fp8gate.calibrate.device.cuda.nvml import gpu_count

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEnvironment:
    """rank of world in all, local_rank of local_world on this machine."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> RankEnvironment | None:
        """None if no launcher of torch.distributed has set it. Raises ValueError if part of it is missing or wrong."""
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return None
        rank, world = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
        if "LOCAL_RANK" not in environment:
            raise ValueError("LOCAL_RANK: expected beside RANK and WORLD_SIZE, as torchrun sets it; not set")
        local_rank, local_world = _number(environment, "LOCAL_RANK"), _number(environment, "LOCAL_WORLD_SIZE", world)
        if not (0 <= rank < world and 0 <= local_rank < local_world <= world):
            raise ValueError(
                f"RANK, LOCAL_RANK: expected ranks below {world} and {local_world}; got {rank} and {local_rank}"
            )
        return cls(rank=rank, world=world, local_rank=local_rank, local_world=local_world)


def claim_gpu(place: RankEnvironment, environment: dict[str, str] | os._Environ[str] = os.environ) -> None:
    """Let this process and its workers see one GPU, that of its local rank; to be called before CUDA starts.

    A launcher may have done so already. Raises ValueError if there are fewer GPUs than local ranks.
    """
    visible = [name for name in environment.get(VISIBLE, ",".join(_gpus())).split(",") if name]
    if len(visible) == 1 and place.local_world > 1 and VISIBLE in environment:
        return  # each rank was given its own
    if visible and place.local_rank >= len(visible):
        raise ValueError(
            f"{VISIBLE}: expected a GPU for each of {place.local_world} ranks on this machine; there are {len(visible)}"
        )
    if visible:
        environment[VISIBLE] = visible[place.local_rank]


def _gpus() -> list[str]:
    """The numbers of this machine's GPUs."""
    return [str(number) for number in range(gpu_count())]


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise ValueError(f"{name}: expected a number, as torchrun sets it; got {text!r}")
    return int(text)
