"""Whether fp8gate's casts replace those that Inductor makes of torchao's. Importing it loads no torch.

Try it: FP8GATE_CASTS=1 python train.py
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

ENVIRONMENT = "FP8GATE_CASTS"
_state = {"enabled": False}


def enable() -> None:
    """Replace the casts in everything that is compiled from now on."""
    _state["enabled"] = True


def enable_if_asked() -> None:
    """The same, if the environment variable FP8GATE_CASTS is 1."""
    if os.environ.get(ENVIRONMENT) == "1":
        enable()


def is_enabled() -> bool:
    """Whether what is compiled now has fp8gate's casts."""
    return _state["enabled"]


@contextlib.contextmanager
def replaced() -> Iterator[None]:
    """Replace the casts in what is compiled inside."""
    with _set(True):
        yield


@contextlib.contextmanager
def not_replaced() -> Iterator[None]:
    """Leave the casts to Inductor in what is compiled inside."""
    with _set(False):
        yield


@contextlib.contextmanager
def _set(enabled: bool) -> Iterator[None]:
    before = _state["enabled"]
    _state["enabled"] = enabled
    try:
        yield
    finally:
        _state["enabled"] = before
