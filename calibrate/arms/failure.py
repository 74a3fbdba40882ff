"""What an exception means for what was to be measured: out of memory, or failed, with a reason short enough to keep."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

DETAIL_LENGTH = 2000  # Inductor's errors carry whole graphs; their first lines say what is wrong
MEMORY_SIGNS = ("out of memory", "ALLOC_FAILED", "can't allocate memory")


class Failure(NamedTuple):
    """Why there is no number."""

    status: Literal["out_of_memory", "failed"]
    detail: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        detail = f"{type(error).__name__}: {error}"[:DETAIL_LENGTH]
        return cls("out_of_memory" if _is_out_of_memory(error) else "failed", detail)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if any(sign in str(error) for sign in MEMORY_SIGNS):
        return True
    return error.__cause__ is not None and _is_out_of_memory(error.__cause__)
