"""Times the kernels of rowwise_casts_kernels.py at every launch in their lists, and the casts made of the fastest.

In: operands of one size. Out: a Timing for each kernel and launch (part_of_cast), then for each whole cast.
benchmarks/rowwise_casts.py runs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from rowwise_casts_equality import all_equal
from rowwise_casts_kernels import (
    AMAX_LAUNCHES,
    PANEL_LAUNCHES,
    ROW_LAUNCHES,
    STRIP_LAUNCHES,
    TILE_LAUNCHES,
    WIDEST_ROW,
    RowLaunch,
    amaxes,
    cast_rows,
    panel_column_form,
    rows_first_forms,
    strip_column_form,
    two_pass_forms,
)
from rowwise_casts_output import Timing
from rowwise_casts_timing import Arguments, least_bytes, moved_bytes, sample_us
from rowwise_casts_torchao import torchao_forms
from triton.runtime.errors import OutOfResources

from fp8gate.casts.operand import Form, Launch
from fp8gate.casts.two_passes import cast_tiles

AnyLaunch = TypeVar("AnyLaunch", Launch, RowLaunch)


@dataclass(kw_only=True, slots=True)
class Candidates(Generic[AnyLaunch]):
    """One kernel and its launches; `fastest` is known once all have been timed."""

    form: str
    kernel: str
    moved: int
    cast: Callable[..., object]  # takes an operand's tensors, and the launch by name
    launches: Sequence[AnyLaunch]
    fastest: AnyLaunch

    def timings(self, m: int, k: int, operands: list[Arguments]) -> Iterator[Timing]:
        best_us = float("inf")
        for launch in self.launches:
            try:
                self.cast(*operands[0], launch=launch)  # compiles it
            except OutOfResources as error:
                print(f"{self.kernel}, {describe(launch)}: {error}", file=sys.stderr)
                continue
            timing = Timing(
                m=m,
                k=k,
                form=self.form,
                method=f"kernel: {self.kernel}",
                launch=describe(launch),
                times_us=sample_us(partial(self.cast, launch=launch), operands),
                least_bytes=self.moved,
                moved_bytes=self.moved,
                part_of_cast=True,
            )
            if timing.us < best_us:
                best_us, self.fastest = timing.us, launch
            yield timing


@dataclass(kw_only=True, slots=True)
class KernelSweep:
    """The kernels and casts at the size that the operands have in common."""

    operands: list[torch.Tensor]
    powers_of_two: bool
    column_tile: Launch = TILE_LAUNCHES[0]  # the fastest, once two_passes("column") has run

    def timings(self) -> Iterator[Timing]:
        yield from self.two_passes("both")
        yield from self.two_passes("column")
        yield from self.one_kernel()
        if self.operands[0].shape[1] <= WIDEST_ROW:
            yield from self.rows_first()

    def two_passes(self, form: str) -> Iterator[Timing]:
        m, k = self.operands[0].shape
        row_form = form == "both"
        amax = Candidates(
            form=form,
            kernel="amaxes",
            moved=2 * m * k,
            cast=partial(amaxes, row_form=row_form),
            launches=AMAX_LAUNCHES,
            fastest=AMAX_LAUNCHES[0],
        )
        tile = Candidates(
            form=form,
            kernel="tiles",
            moved=least_bytes(m, k, form),
            cast=partial(self.tiles, row_form),
            launches=TILE_LAUNCHES,
            fastest=TILE_LAUNCHES[0],
        )
        yield from amax.timings(m, k, [(x,) for x in self.operands])
        yield from tile.timings(m, k, [(x, *self.known_amaxes(x)) for x in self.operands])
        cast = partial(
            two_pass_forms,
            powers_of_two=self.powers_of_two,
            row_form=row_form,
            amax_launch=amax.fastest,
            tile_launch=tile.fastest,
        )
        yield self.time_cast(form, "two passes", f"{describe(amax.fastest)}; {describe(tile.fastest)}", cast)
        if form == "column":
            self.column_tile = tile.fastest

    def tiles(self, row_form: bool, x: torch.Tensor, row: torch.Tensor, column: torch.Tensor, launch: Launch) -> object:
        return cast_tiles(x, row if row_form else None, column, powers_of_two=self.powers_of_two, launch=launch)

    def known_amaxes(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        row_amax, column_amax = amaxes(x, row_form=True, launch=AMAX_LAUNCHES[0])
        assert row_amax is not None
        return row_amax, column_amax

    def one_kernel(self) -> Iterator[Timing]:
        for launch in PANEL_LAUNCHES:
            cast = partial(panel_column_form, powers_of_two=self.powers_of_two, launch=launch)
            yield self.time_cast("column", "panels", describe(launch), cast)
        for launch in STRIP_LAUNCHES:
            cast = partial(strip_column_form, powers_of_two=self.powers_of_two, launch=launch)
            yield self.time_cast("column", "strip", describe(launch), cast)

    def rows_first(self) -> Iterator[Timing]:
        m, k = self.operands[0].shape
        rows = Candidates(
            form="row",
            kernel="rows and column amaxes",
            moved=least_bytes(m, k, "row"),
            cast=partial(cast_rows, powers_of_two=self.powers_of_two),
            launches=ROW_LAUNCHES,
            fastest=ROW_LAUNCHES[0],
        )
        yield from rows.timings(m, k, [(x,) for x in self.operands])
        cast = partial(
            rows_first_forms,
            powers_of_two=self.powers_of_two,
            row_launch=rows.fastest,
            tile_launch=self.column_tile,
        )
        yield self.time_cast("both", "rows first", f"{describe(rows.fastest)}; {describe(self.column_tile)}", cast)

    def time_cast(
        self, form: str, method: str, launch: str, cast: Callable[[torch.Tensor], Form | tuple[Form | None, Form]]
    ) -> Timing:
        """A whole cast, compared with torchao's."""
        m, k = self.operands[0].shape

        def tensors(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            made = cast(x)
            forms = (made,) if isinstance(made, Form) else made
            return tuple(tensor for form in forms if form is not None for tensor in (form.data, form.scale))

        theirs = torchao_forms(form, powers_of_two=self.powers_of_two)(self.operands[0])
        equal = all_equal(tensors(self.operands[0]), theirs)
        return Timing(
            m=m,
            k=k,
            form=form,
            method=method,
            launch=launch,
            times_us=sample_us(tensors, [(x,) for x in self.operands]),
            least_bytes=least_bytes(m, k, form),
            moved_bytes=moved_bytes(m, k, form),
            equal=equal,
        )


def describe(launch: Launch | RowLaunch) -> str:
    tile = f"{launch.elements} elements" if isinstance(launch, RowLaunch) else f"{launch.rows} x {launch.columns}"
    walk = f", walk {launch.walk}" if launch.walk else ""
    stages = f", {launch.stages} stages" if launch.stages > 1 else ""
    panel = f", panels of {launch.panel_bytes >> 20} MiB" if isinstance(launch, Launch) and launch.panel_bytes else ""
    return f"{tile}, {launch.warps} warps{walk}{stages}{panel}"
