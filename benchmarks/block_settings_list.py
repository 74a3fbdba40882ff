"""The settings of Inductor and functorch that benchmarks/block_settings.py tries, and what turns them on.

In: a name such as "inductor.triton.max_tiles=3". Out: a context in which the installed torch compiles with it. Each
setting could change how float8 casts are compiled, or what the backward pass computes again. The kernels of
fp8gate.casts are named like a setting too: "fp8gate.casts=True".
"""

from __future__ import annotations

import ast
import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch._functorch.config
import torch._inductor.config

from fp8gate.filter.contract.errors import InputError


class CastsConfig:
    """fp8gate.casts, off by default, in the way that torch's modules of settings are used.

    Turning it on is left to `SettingsBench.casts_of`, as what compiles a layer is told who casts.
    """

    def get_config_copy(self) -> dict[str, object]:
        return {"casts": False}

    def patch(self, _: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


MODULES: Mapping[str, Any] = {
    "inductor": torch._inductor.config,
    "functorch": torch._functorch.config,
    "fp8gate": CastsConfig(),
}
OTHER = "other"  # as a value: what a setting is not by default, of True and False
CASTS_ON = "fp8gate.casts=True"
TOGETHER = " + "  # between the names of settings that are on at once
AGAIN = "again"
"""Instead of a setting: production's settings a second time, compiled and tuned anew. It gains what noise gains."""

CANDIDATES: tuple[Mapping[str, object], ...] = (
    {"inductor.triton.tile_reductions": True},
    {"inductor.triton.prefer_nd_tiling": True},
    {"inductor.triton.tile_reductions": True, "inductor.triton.prefer_nd_tiling": True},  # as Inductor recommends
    {"inductor.triton.max_tiles": 3},
    {"inductor.loop_ordering_after_fusion": OTHER},
    {"inductor.max_autotune_pointwise": True},
    {"inductor.coordinate_descent_tuning": True},
    {"inductor.triton.multi_kernel": 1},
    {"inductor.split_reductions": False},
    {"inductor.triton.cooperative_reductions": True},
    {"inductor.benchmark_fusion": True},
    {"functorch.activation_memory_budget": 0.5},
    {"functorch.activation_memory_budget": 0.9},
    {"functorch.ban_recompute_reductions": OTHER},
    {"functorch.aggressive_recomputation": True},
    {"functorch.recompute_views": True},
    {"functorch.ban_recompute_not_in_allowlist": False},
    {"functorch.treat_parameters_as_free_to_save": OTHER},
    {"fp8gate.casts": True},
)
"""Each is tried alone, beside production's settings."""

SLOW = frozenset({"inductor.coordinate_descent_tuning"})
"""They tune each kernel for many seconds at its first launch, so all others are measured before."""

Names = tuple[str, ...]
"""Settings that are on at once: "inductor.triton.max_tiles=3"."""


@dataclass(frozen=True, slots=True)
class KnownSettings:
    """Of the candidates: those that the installed torch can turn on, and why it cannot turn on the others."""

    candidates: tuple[Names, ...]
    skipped: tuple[str, ...]

    @classmethod
    def of_torch(cls, candidates: Sequence[Mapping[str, object]] = CANDIDATES) -> KnownSettings:
        found, skipped = [], []
        for candidate in candidates:
            if unknown := [key for key in candidate if not _is_known(key)]:
                skipped.append(f"{', '.join(unknown)}: unknown to torch {torch.__version__}")
                continue
            values = {key: not _default(key) if value == OTHER else value for key, value in candidate.items()}
            names = tuple(f"{key}={value!r}" for key, value in values.items())
            if all(value == _default(key) for key, value in values.items()):
                skipped.append(f"{TOGETHER.join(names)}: the default of torch {torch.__version__}")
                continue
            found.append(names)
        return cls(tuple(found), tuple(skipped))

    def named(self, wanted: Sequence[str] | None) -> tuple[Names, ...]:
        """The candidates with these names, with or without their module and value; all for None.

        "A + B" is the candidate of that name, or A and B at once. Raises InputError for a name that no candidate has.
        """
        if wanted is None:
            return self.candidates
        chosen = {name: self._called(name) for name in wanted}
        for name, found in chosen.items():
            if not found and not all(map(_is_of_a_candidate, name.split(TOGETHER))):
                known = ", ".join(map(TOGETHER.join, self.candidates))
                raise InputError(f"--settings: expected any of {known}; got {name!r}")
        named = dict.fromkeys(itertools.chain.from_iterable(chosen.values()))
        at_once = [one for one in named if one not in self.candidates]
        return (*(one for one in self.candidates if one in named), *at_once)

    def _called(self, name: str) -> list[Names]:
        alone = [one for one in self.candidates if name in _spellings(one)]
        parts = name.split(TOGETHER)
        if alone or len(parts) == 1:
            return alone
        return [sum(several, ()) for several in itertools.product(*map(self._called, parts))]

    @property
    def names(self) -> Names:
        """Every setting that a candidate turns on, once."""
        return tuple(dict.fromkeys(name for one in self.candidates for name in one))


def is_slow(names: Names) -> bool:
    return any(key_of(name) in SLOW for name in names)


def key_of(name: str) -> str:
    """The setting that a name gives a value to."""
    return name.partition("=")[0]


def is_setting(name: str) -> bool:
    return name.partition(".")[0] in MODULES and "=" in name


@contextlib.contextmanager
def settings_on(names: Sequence[str]) -> Iterator[None]:
    """Compile with these settings inside, and as before afterwards."""
    with contextlib.ExitStack() as stack:
        for name in names:
            module, _, key = key_of(name).partition(".")
            value = ast.literal_eval(name.partition("=")[2])
            stack.enter_context(MODULES[module].patch({key: value}))
        yield


def _is_of_a_candidate(name: str) -> bool:
    """Of one that this torch can turn on or not."""
    return any(name in _spellings(tuple(one)) for one in CANDIDATES)


def _is_known(key: str) -> bool:
    module, _, inner = key.partition(".")
    return inner in MODULES[module].get_config_copy()


def _default(key: str) -> Any:
    module, _, inner = key.partition(".")
    return MODULES[module].get_config_copy()[inner]


def _spellings(names: Names) -> set[str]:
    """What people may call a candidate: whole, without the module, without the value."""
    found = set()
    for parts in (names, tuple(map(key_of, names))):
        found |= {TOGETHER.join(parts), TOGETHER.join(part.partition(".")[2] for part in parts)}
    return found
