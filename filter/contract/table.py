"""The table that `calibrate` writes and `filter` reads: one YAML file per device and recipe.

In: a file, or a `Table` made from measurements. Out: a validated `Table`, or a file that reads well in a diff.
Try it: python -c "from fp8gate.filter.contract.table import read_table; print(len(read_table('FILE.yaml').points))"
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec

from fp8gate.filter.contract.bounds import Bounds, Spread, Unaligned
from fp8gate.filter.contract.devices import device_slug
from fp8gate.filter.contract.merged_sweep import MergedSweep
from fp8gate.filter.contract.plain_yaml import (
    convert,
    format_number,
    read_text,
    require_schema,
    write_atomically,
    yaml_line,
)
from fp8gate.filter.contract.reading.messages import FileError
from fp8gate.filter.contract.reading.plain_values import MAX_SIZE
from fp8gate.filter.contract.reading.point_rows import PointRows
from fp8gate.filter.contract.reading.row_numbers import row_problem
from fp8gate.filter.contract.recipes import VARIANTS, Casts, Recipe, Variant
from fp8gate.filter.contract.shapes import LinearShape

MAX_TABLE_BYTES = 12 * 2**20
"""The largest table file that is read. A row has 90 bytes, so it holds 130,000 points; a default sweep has 432."""
Size = Annotated[int, msgspec.Meta(gt=0, le=MAX_SIZE)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
DeviceKindName = Literal["cuda", "cpu"]
"""The kinds of device that can be measured, as torch names them."""
Status = Literal["measured", "ambiguous", "out_of_memory", "unstable", "failed", "noisy"]
"""noisy: the point was timed, but its times are noise: its bounds are too wide, or measurements of it disagree."""
WITH_NUMBERS: tuple[Status, ...] = ("measured", "ambiguous")
EstimateKind = Literal["paired_rounds", "quotient_of_times"]


class TableError(FileError):
    """A table that cannot be used; the message names the file, the field and what was expected there."""


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The device that was measured. A GPU has the name that its driver gives; a CPU has no GPU fields.

    Raises InputError for a name without letters and digits.
    """

    name: Annotated[str, msgspec.Meta(max_length=200)]  # names a folder: file systems allow 255 bytes
    kind: DeviceKindName
    capability: str | None = None
    multiprocessors: Size | None = None
    threads: Size | None = None
    memory_gib: Positive
    l2_mib: Positive | None = None
    power_limit_w: Positive | None = None

    def __post_init__(self) -> None:
        device_slug(self.name)


class Software(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The releases that the device was measured with."""

    torch: str
    torchao: str
    triton: str | None = None
    cuda: str | None = None
    driver: str | None = None
    fp8gate: str


TimerName = Literal["cuda_graph_events", "cuda_graphs", "wall_clock"]
"""GPU time by events inside of CUDA graphs, or by events around their launch (until 2026-11-26); on a CPU, time."""


class SweepProtocol(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the numbers were taken. Tables with different protocols are not comparable.

    Names that end in `_s` are seconds. settle_s, run_s: each arm runs alone on the device, first for settle_s, which do
    not count, then for run_s or longer; both are shorter for an arm that leaves the device idle half of the time.
    pause_s: a device at its power limit idles for so long after a few arms.
    rounds: how many samples an arm has after its first run, and after its second if there is one. A sample is the mean
    of a part of the run's rounds.
    near: where there is a second run, an arm has one whose speedup is within `near` of the threshold, or whose bounds
    straddle the threshold, and so has bf16. Only the last run counts. near_s: how long it took at the power limit, in
    tables that have it.
    casts: who compiled those of float8 operands. A file has it only if that is not Inductor.
    confidence: that of the part of the bounds that varies within one run.
    bounds: what the bounds cover, and their parts. Without it they cover only what varies within one run.
    threshold, tolerance: a point is ambiguous if its bounds straddle the threshold and are wider than `tolerance`.
    control: how far bf16 timed against itself may be from 1, beyond chance and 0.5 us. controls: how far it was.
    spread: how far a second process on the same device was from the first, at the points that it measured again.
    devices: how many took part. between: how far each was from the median of all, at the points that all measured.
    unaligned: what the filter multiplies a speedup by for tokens that are no multiple of 128. Without it, by nothing.
    estimate: what `speedup` is in every row. quotient_of_times: the quotient of the row's own times, with bounds from
    all ratios of a bf16 sample to a float8 sample. paired_rounds: the Hodges-Lehmann estimate from ratios of samples of
    the same number, with the bounds of that estimate; tables had this before they named their estimate.
    """

    timer: TimerName
    compile: bool
    inductor: dict[str, bool]
    casts: Casts = "inductor"
    bf16: Literal["eager", "compiled"]
    l2: Literal["cold"]
    data: str
    settle_s: Annotated[float, msgspec.Meta(ge=0)]
    run_s: Annotated[float, msgspec.Meta(ge=0)]
    pause_s: Annotated[float, msgspec.Meta(ge=0)]
    rounds: tuple[Size, ...]
    confidence: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    threshold: Positive
    tolerance: Positive
    near: Positive
    near_s: Positive | None = None
    control: Positive
    spread: Spread | None = None
    controls: Spread | None = None
    devices: Size = 1
    between: Spread | None = None
    estimate: EstimateKind = "paired_rounds"
    bounds: Bounds | None = None
    unaligned: Unaligned | None = None


class Grid(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The axes that were swept. A table may have points off these axes, and may lack some points on them."""

    m: tuple[Size, ...] = ()
    k: tuple[Size, ...] = ()
    n: tuple[Size, ...] = ()


class Incomplete(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far the table's sweep had come when it was stopped: `measured` of the `of` measurements that it was to take.

    Each point is measured, and some are measured again. A point that the sweep did not come to has no row.
    """

    measured: Size
    of: Size

    def __str__(self) -> str:
        return f"{self.measured} of {self.of} measurements"


class Point(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The row of one shape. Only a row whose status is in WITH_NUMBERS has numbers; in all others they are None.

    Times are in microseconds, each the median of the samples of one arm in one direction. speedup: bf16 time / float8
    time of forward plus backward, as `SweepProtocol.estimate` says. speedup_low, speedup_high: its bounds, as
    `SweepProtocol.bounds` says. They cover every measurement of the point that agrees with it, too.
    """

    m: Size
    k: Size
    n: Size
    bf16_fwd_us: Positive | None
    bf16_bwd_us: Positive | None
    fp8_fwd_us: Positive | None
    fp8_bwd_us: Positive | None
    speedup: Positive | None
    speedup_low: Positive | None
    speedup_high: Positive | None
    status: Status

    @property
    def shape(self) -> LinearShape:
        return LinearShape(self.m, self.k, self.n)

    @property
    def numbers(self) -> tuple[float | None, ...]:
        return msgspec.structs.astuple(self)[3:-1]

    @property
    def total_us(self) -> tuple[float, float]:
        """Forward plus backward in bf16 and in float8, of a row that has numbers."""
        bf16_fwd_us, bf16_bwd_us, fp8_fwd_us, fp8_bwd_us = (us for us in self.numbers[:4] if us is not None)
        return bf16_fwd_us + bf16_bwd_us, fp8_fwd_us + fp8_bwd_us


COLUMNS = Point.__struct_fields__


class _Points(msgspec.Struct):
    points: tuple[Point, ...]


POINT_ROWS = PointRows(_Points, numbers=len(COLUMNS) - 4, statuses=get_args(Status), error=TableError)


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"schema_": "schema"}):
    """Everything measured for one device and recipe. The file has the fields in this order.

    merged_from: only in a merged table: the sweeps that it was made of, the oldest first.
    incomplete: only in the table of a sweep that was stopped. The same command goes on, and then writes it without.
    """

    schema_: Literal[1] = 1
    recipe: Recipe
    device: Device
    software: Software
    protocol: SweepProtocol
    measured_at: Annotated[datetime, msgspec.Meta(tz=True)]
    merged_from: Annotated[tuple[MergedSweep, ...], msgspec.Meta(min_length=2)] | None = None
    incomplete: Incomplete | None = None
    grid: Grid
    columns: tuple[str, ...] = COLUMNS
    points: tuple[Point, ...]

    @property
    def variant(self) -> Variant:
        return Variant(self.recipe, self.protocol.casts)


def read_table(path: str | os.PathLike[str]) -> Table:
    """Read and validate a table file.

    Raises TableError if the file cannot be read, is not plain YAML data, or breaks the schema in any way.
    """
    return parse_table(read_text(path, TableError, at_most=MAX_TABLE_BYTES), source=str(path))


def parse_table(text: str, *, source: str) -> Table:
    """`read_table` for text already in memory; `source` names it in errors."""
    data = POINT_ROWS.load(text, source=source)
    require_schema(data, source=source, error=TableError)
    table = convert(data, Table, source=source, error=TableError)
    _check(table, source)
    return table


def write_tables(tables: Mapping[Path, Table]) -> None:
    """Write tables atomically: all or none, and at every moment a file is either the old one or the new one.

    The same measurements give the same bytes. Raises TableError, and writes nothing, if a table could not be read
    again.
    """
    texts = {path: format_table(table) for path, table in tables.items()}
    for path, text in texts.items():
        parse_table(text, source=str(path))
    write_atomically(texts)


def write_table(table: Table, path: str | os.PathLike[str]) -> None:
    """Write one table, as `write_tables` does."""
    write_tables({Path(path): table})


def format_table(table: Table) -> str:
    """The file's text: keys in fixed order, one point a line sorted by (m, k, n), numbers rounded."""
    fields = msgspec.to_builtins(table).items()
    lines = [yaml_line(key, value) for key, value in fields if key != "points" and value is not None]
    rows = (_format_point(point) for point in sorted(table.points, key=lambda p: p.shape))
    return "".join(lines) + "points:\n" + "".join(rows)


def _check(table: Table, source: str) -> None:
    """Check what types cannot express: column names, sorted axes and points, no duplicates, consistent numbers."""
    if table.columns != COLUMNS:
        raise TableError(f"{source}: $.columns: expected {list(COLUMNS)}, found {list(table.columns)}")
    if not table.protocol.rounds or list(table.protocol.rounds) != sorted(set(table.protocol.rounds)):
        raise TableError(f"{source}: $.protocol.rounds: expected ascending counts, found {table.protocol.rounds}")
    for axis, values in msgspec.structs.asdict(table.grid).items():
        if list(values) != sorted(set(values)):
            raise TableError(f"{source}: $.grid.{axis}: expected ascending sizes, each once; found {list(values)}")
    if table.merged_from and len(set(table.merged_from)) < len(table.merged_from):
        raise TableError(f"{source}: $.merged_from: expected each sweep once")
    if table.incomplete and table.incomplete.measured >= table.incomplete.of:
        raise TableError(
            f"{source}: $.incomplete.measured: expected fewer than $.incomplete.of, {table.incomplete.of}; "
            f"found {table.incomplete.measured}"
        )
    if table.variant not in VARIANTS:
        raise TableError(f"{source}: $.protocol.casts: {table.recipe} cannot have {table.protocol.casts}'s casts")
    if not table.points:
        raise TableError(f"{source}: $.points: expected at least one point")
    _check_points(table.points, table.protocol.estimate, source)


def _check_points(points: Sequence[Point], estimate: EstimateKind, source: str) -> None:
    previous = (0, 0, 0)
    for i, point in enumerate(points):
        is_measured = point.status in WITH_NUMBERS
        if problem := row_problem(COLUMNS[3:-1], point.numbers, point.status, estimate, is_measured=is_measured):
            raise TableError(f"{source}: $.points[{i}]{problem}")
        shape = (point.m, point.k, point.n)
        if shape <= previous:
            problem = "is there twice" if shape == previous else f"comes after {previous}"
            raise TableError(f"{source}: $.points[{i}]: {shape} {problem}; expected each once, sorted by m, k, n")
        previous = shape


def _format_point(point: Point) -> str:
    numbers = map(format_number, point.numbers)
    return f"  - [{', '.join([str(point.m), str(point.k), str(point.n), *numbers, point.status])}]\n"
