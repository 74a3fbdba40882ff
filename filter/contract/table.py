"""The table: what `calibrate` writes and `filter` reads, one YAML file per device and recipe.

In: a file, or a `Table` built from measurements. Out: a validated `Table`, or a file that reads well in a diff.
Try it: python -c "from fp8gate.filter.contract.table import read_table; print(len(read_table('FILE.yaml').points))"
"""

from __future__ import annotations

import math
import os
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.plain_yaml import (
    convert,
    format_number,
    load_plain_yaml,
    read_text,
    require_schema,
    write_atomically,
    yaml_line,
)
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import LinearShape

Size = Annotated[int, msgspec.Meta(gt=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Status = Literal["measured", "ambiguous", "out_of_memory", "unstable", "failed"]
WITH_NUMBERS: tuple[Status, ...] = ("measured", "ambiguous")


class TableError(InputError):
    """A table that cannot be used; the message names the file, the field and what was expected there."""


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The device measured. A GPU as its driver names it; a CPU has `kind: cpu` and no GPU fields."""

    name: str
    kind: Literal["cuda", "cpu"]
    capability: str | None = None
    multiprocessors: Size | None = None
    threads: Size | None = None
    memory_gib: Positive
    l2_mib: Positive | None = None
    power_limit_w: Positive | None = None


class Software(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The releases measured with."""

    torch: str
    torchao: str
    triton: str | None = None
    cuda: str | None = None
    driver: str | None = None
    fp8gate: str


class Spread(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far measurements of the same `points` points differed: |ratio of the speedups - 1|."""

    points: Size
    median: Annotated[float, msgspec.Meta(ge=0)]
    p95: Annotated[float, msgspec.Meta(ge=0)]
    worst: Annotated[float, msgspec.Meta(ge=0)]


class SweepProtocol(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the numbers were taken; two tables with different protocols are not comparable.

    settle_s, run_s: each arm runs alone on the device for settle_s uncounted, then for run_s or longer, both less where
    it leaves the device idle half of the time. pause_s: a device at its power limit idles so long after a few arms.
    near_s: an arm whose speedup is within `near` of the threshold, or whose bounds straddle it, runs again, and bf16
    too, for near_s at the power limit. rounds: samples after the first run and after the second, each the mean of a
    part of the run's rounds. The last run counts; the bounds at `confidence` tell what varies within it, not from one
    run to the next, as `spread` does. A point whose bounds straddle the threshold and are wider than `tolerance` is
    ambiguous. control: how far bf16 timed against itself may be from 1, beyond chance and 0.5 us; controls: how far it
    was. spread: of the points that a second process measured again on the same device. devices: how many took part;
    between: how far each is from the median of all, at the points that all measured.
    """

    timer: Literal["cuda_graphs", "wall_clock"]
    compile: bool
    inductor: dict[str, bool]
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
    near_s: Positive
    control: Positive
    spread: Spread | None = None
    controls: Spread | None = None
    devices: Size = 1
    between: Spread | None = None


class Grid(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The axes swept; points off these axes may be in a table too, and axes without some of their points."""

    m: tuple[Size, ...] = ()
    k: tuple[Size, ...] = ()
    n: tuple[Size, ...] = ()


class Point(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One shape measured. Times in microseconds, medians over rounds; numbers are None unless `status` has them.

    speedup: bf16 time / float8 time of forward plus backward, estimated from the per-round ratios, with the
    confidence bounds speedup_low and speedup_high.
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


COLUMNS = Point.__struct_fields__


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"schema_": "schema"}):
    """Everything measured for one device and recipe. Field order is the order in the file."""

    schema_: Literal[1] = 1
    recipe: Recipe
    device: Device
    software: Software
    protocol: SweepProtocol
    measured_at: Annotated[datetime, msgspec.Meta(tz=True)]
    grid: Grid
    columns: tuple[str, ...] = COLUMNS
    points: tuple[Point, ...]


def read_table(path: str | os.PathLike[str]) -> Table:
    """Read and validate a table file.

    Raises TableError if the file cannot be read, is not plain YAML data, or breaks the schema in any way.
    """
    return parse_table(read_text(path, TableError), source=str(path))


def parse_table(text: str, *, source: str) -> Table:
    """`read_table` for text already in memory; `source` names it in errors."""
    data = load_plain_yaml(text, source=source, error=TableError)
    require_schema(data, source=source, error=TableError)
    table: Table = convert(data, Table, source=source, error=TableError)
    _check(table, source)
    return table


def write_table(table: Table, path: str | os.PathLike[str]) -> None:
    """Write atomically: the file is the old one or the new one, whatever happens meanwhile.

    The same measurements give the same bytes. Raises TableError rather than write what could not be read again.
    """
    text = format_table(table)
    parse_table(text, source=str(path))
    write_atomically(Path(path), text)


def format_table(table: Table) -> str:
    """The file's text: fixed key order, one point a line, numbers rounded, points sorted by (m, k, n)."""
    header = msgspec.to_builtins(table)
    del header["points"]
    lines = [yaml_line(key, value) for key, value in header.items()]
    rows = (_format_point(point) for point in sorted(table.points, key=lambda p: p.shape))
    return "".join(lines) + "points:\n" + "".join(rows)


def _check(table: Table, source: str) -> None:
    """What types alone cannot say: column names, axis order, sorting, duplicates, consistent numbers."""
    if table.columns != COLUMNS:
        raise TableError(f"{source}: $.columns: expected {list(COLUMNS)}, found {list(table.columns)}")
    for field in ("device", "protocol"):
        for name, value in msgspec.structs.asdict(getattr(table, field)).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise TableError(f"{source}: $.{field}.{name}: expected a finite number, found {value}")
    if not table.protocol.rounds or list(table.protocol.rounds) != sorted(set(table.protocol.rounds)):
        raise TableError(f"{source}: $.protocol.rounds: expected ascending counts, found {table.protocol.rounds}")
    for axis in ("m", "k", "n"):
        values = getattr(table.grid, axis)
        if list(values) != sorted(set(values)):
            raise TableError(f"{source}: $.grid.{axis}: expected ascending sizes, each once; found {list(values)}")
    if not table.points:
        raise TableError(f"{source}: $.points: expected at least one point")
    previous: LinearShape | None = None
    for i, point in enumerate(table.points):
        _check_point(point, f"{source}: $.points[{i}]")
        if previous is not None and point.shape <= previous:
            problem = "is there twice" if point.shape == previous else f"comes after {previous}"
            raise TableError(f"{source}: $.points[{i}]: {point.shape} {problem}; expected each once, sorted by m, k, n")
        previous = point.shape


def _check_point(point: Point, where: str) -> None:
    expects_numbers = point.status in WITH_NUMBERS
    for column, number in zip(COLUMNS[3:-1], point.numbers, strict=True):
        if expects_numbers and (number is None or not math.isfinite(number)):
            raise TableError(f"{where}.{column}: expected a finite number for status {point.status}, found {number}")
        if not expects_numbers and number is not None:
            raise TableError(f"{where}.{column}: expected null for status {point.status}, found {number}")
    if expects_numbers:
        low, speedup, high = point.speedup_low, point.speedup, point.speedup_high
        if not (low or 0) <= (speedup or 0) <= (high or 0):  # none is None here: checked above
            raise TableError(
                f"{where}.speedup: expected speedup_low <= speedup <= speedup_high, found {low}, {speedup}, {high}"
            )


def _format_point(point: Point) -> str:
    numbers = map(format_number, point.numbers)
    return f"  - [{', '.join([str(point.m), str(point.k), str(point.n), *numbers, point.status])}]\n"
