"""The runs of benchmarks/train_titan.py: one for each set of linears, and those of the variants. Pure.

In: what each choice converts. Out: `Run`s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from train_titan_output import CASTS, Choice, Run, Variant, choices_with


def runs_of(
    float8: Mapping[Choice, tuple[str, ...]],
    variants: Sequence[Variant],
    with_casts: Mapping[Choice, tuple[str, ...]],
) -> tuple[Run, ...]:
    """A run for each set of linears, beginning with bf16, then those of the variants.

    with_casts: what choices convert by what was measured with fp8gate's casts.
    """
    runs = _by_set(float8)
    best: Choice = "plan" if "plan" in float8 else "table"
    for variant in variants:
        sets = with_casts if variant == CASTS else float8
        asked = [choice for choice in choices_with(variant, best) if choice in sets and choice in float8]
        runs += _by_set({choice: sets[choice] for choice in asked}, variant)
    return tuple(runs)


def _by_set(float8: Mapping[Choice, tuple[str, ...]], variant: Variant | None = None) -> list[Run]:
    by_set: dict[tuple[str, ...], list[Choice]] = defaultdict(list)
    for choice, names in float8.items():
        by_set[names].append(choice)
    return [Run(choices=tuple(choices), float8=names, variant=variant) for names, choices in by_set.items()]
