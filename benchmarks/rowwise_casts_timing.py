"""GPU time of a cast, one value a sample, and how many bytes it must move.

CUDA events around the replay of a CUDA graph that casts several operands in turn, together `ROTATED_BYTES` or more: no
operand is left in the L2 cache from the last time, and the launch of the graph is shared by all. Events resolve 0.5 us.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

SAMPLES, WARM_UP = 25, 3
ROTATED_BYTES = 400_000_000  # eight times the L2 cache of an H100
LEAST_OPERANDS = 3
COPY_BYTES = 4  # an element: bf16 read and written
FORMS = {"row": 1, "column": 1, "both": 2}
"""How many float8 forms of the operand a cast writes."""

Arguments = tuple[torch.Tensor, ...]


def least_bytes(m: int, k: int, form: str) -> int:
    """The operand read once in bf16, each form written once in float8 with its float32 scales."""
    scales = {"row": m, "column": k, "both": m + k}[form]
    return m * k * (2 + FORMS[form]) + 4 * scales


def moved_bytes(m: int, k: int, form: str) -> int:
    """As `least_bytes`, but reading the operand twice: amaxes before casts, with nothing left in a cache."""
    return least_bytes(m, k, form) + 2 * m * k


def random_operands(m: int, k: int, device: torch.device) -> list[torch.Tensor]:
    """As many bf16 operands as together exceed the cache; rows and columns differ in size."""
    count = max(LEAST_OPERANDS, -(-ROTATED_BYTES // (2 * m * k)))
    size = torch.rand(m, 1, device=device) + torch.rand(1, k, device=device)
    return [(torch.randn(m, k, device=device) * size).bfloat16() for _ in range(count)]


def sample_us(cast: Callable[..., object], operands: Sequence[Arguments]) -> tuple[float, ...]:
    """Time of one cast in each of `SAMPLES` replays, in us. The cast must have run once before."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        outputs = [cast(*arguments) for arguments in operands]  # kept: each writes to memory of its own
    for _ in range(WARM_UP):
        graph.replay()
    events = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(SAMPLES)]  # type: ignore[no-untyped-call]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times_us = tuple(1e3 * start.elapsed_time(end) / len(operands) for start, end in events)
    del outputs
    graph.reset()
    return times_us
