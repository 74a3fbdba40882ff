"""What a timer is: it takes an arm and gives samples of its forward and backward. Each kind of device has its own.

A timer is used in the same way on every device: prepare every arm, run rounds, free them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

WARM_UP_RUNS = 2  # the first loads and tunes the kernels; the second runs undisturbed
TUNING_RUNS = (3, 9)  # of one launch configuration; only short ones run more often than the first three times


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one arm, in microseconds."""

    fwd_us: float
    bwd_us: float


class Arm(Protocol):
    """What is timed: one way to compute a linear, or a block of layers."""

    def forward(self) -> Tensor: ...

    def backward(self, output: Tensor) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True, slots=True)
class Results:
    """What an arm computed. Of a linear: output (m, n), and the gradients of x (m, k) and of weight (n, k)."""

    output: Tensor
    gradients: tuple[Tensor, ...]

    @property
    def grad_x(self) -> Tensor:
        return self.gradients[0]

    @property
    def grad_weight(self) -> Tensor:
        return self.gradients[1]


Prepared = TypeVar("Prepared")
Order = Sequence[int]
"""The arms of a round by index, in the order in which they run."""


class Timer(Protocol[Prepared]):
    """Times arms on one device."""

    def prepare(self, arm: Arm) -> Prepared:
        """Warm up and, on a GPU, capture."""

    def results(self, prepared: Prepared) -> Results:
        """Run once and return what was computed, for the numeric check."""

    def rounds(self, prepared: Sequence[Prepared], orders: Sequence[Order]) -> list[list[Sample]]:
        """Run a round for each order, or more. Returns the samples of each round, in the order of `prepared`."""

    def forget_results(self, prepared: Prepared) -> None:
        """Let other arms compute in the memory of these results: nobody asks for them any more."""

    def least_us(self, launch: Callable[[], object]) -> float:
        """The shortest time of a few runs of what `launch` runs, with a cold cache, in microseconds."""

    def flush(self) -> None:
        """Make the cache cold for what is timed next."""

    def free(self, prepared: Sequence[Prepared]) -> None:
        """Give back what these arms hold on the device. Returns when the device has finished."""
