"""Which shapes are measured: a named grid, a grid file, a model's own shapes; and which are too large to be.

In: a grid's name or file, a device. Out: shapes in the order they are measured, and those capped with the reason.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import msgspec

from fp8gate.calibrate.device.registry import KINDS
from fp8gate.filter.contract.plain_yaml import convert, load_plain_yaml
from fp8gate.filter.contract.reading.file_bytes import UnreadableError, read_utf8
from fp8gate.filter.contract.reading.messages import FileError
from fp8gate.filter.contract.reading.yaml_data import MAX_CHARACTERS
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Device, DeviceKindName, Grid, Size, parse_table

MAX_MEMORY_SHARE = 0.9
MAX_SHAPES = 100_000
"""Shapes of a grid file. A table can hold them; at 1.5 s a shape, as on an H100, they would take two days."""


class GridError(FileError):
    """A grid that cannot be measured; the message names the file and the field."""


class GridFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A user's grid: axes, all combinations of which are measured, and single [m, k, n] shapes beside them."""

    m: tuple[Size, ...] = ()
    k: tuple[Size, ...] = ()
    n: tuple[Size, ...] = ()
    shapes: tuple[tuple[Size, Size, Size], ...] = ()


def load_grid(name: str, kind: DeviceKindName) -> tuple[Grid, list[LinearShape]]:
    """The axes and the single shapes of a grid: a named one (quick, default, full), a YAML file, or a table's file.

    A table's grid has its points, so that the same are measured again. Raises GridError for a file that cannot be read,
    breaks the format, or names a shape float8 cannot compute; TableError for a table that breaks its format.
    """
    named = KINDS[kind].defaults.grids
    if name in named:
        return named[name], []
    try:
        text = read_utf8(name, at_most=MAX_CHARACTERS)
    except UnreadableError as error:
        raise GridError(
            f"grid: expected quick, default, full or a readable YAML file; got {name!r} ({error})"
        ) from error
    data = load_plain_yaml(text, source=name, error=GridError)
    if isinstance(data, dict) and "recipe" in data:
        table = parse_table(text, source=name)
        return table.grid, [point.shape for point in table.points]
    file = convert(data, GridFile, source=name, error=GridError)
    grid = Grid(m=_axis(file.m), k=_axis(file.k), n=_axis(file.n))
    shapes = [LinearShape(*sizes) for sizes in file.shapes]
    _require_shapes(grid, shapes, name)
    return grid, shapes


def _require_shapes(grid: Grid, shapes: list[LinearShape], name: str) -> None:
    """Raise GridError for no shape, for too many, and for one that float8 cannot compute."""
    count = len(grid.m) * len(grid.k) * len(grid.n) + len(shapes)
    if not count:
        raise GridError(f"{name}: expected m, k and n with a size each, or shapes; found no shape")
    if count > MAX_SHAPES:
        raise GridError(f"{name}: expected at most {MAX_SHAPES:,} combinations of m, k and n; found {count:,}")
    for shape in [*grid_shapes(grid), *shapes]:
        if problem := shape.indivisible():
            raise GridError(f"{name}: {shape}: expected multiples of 16, as float8 products need; {problem}")


def grid_shapes(grid: Grid) -> list[LinearShape]:
    """All combinations of the axes."""
    return [LinearShape(m, k, n) for m, k, n in itertools.product(grid.m, grid.k, grid.n)]


def union(*grids: Grid) -> Grid:
    """Every size of every axis. Not all combinations need have been measured."""
    m, k, n = (_axis(itertools.chain(*axes)) for axes in zip(*((g.m, g.k, g.n) for g in grids), strict=True))
    return Grid(m=m, k=k, n=n)


def measuring_order(shapes: Iterable[LinearShape], seed: int) -> list[LinearShape]:
    """Each shape once, shuffled: the time left is honest from the start, and slow drift does not follow an axis."""
    ordered = sorted(set(shapes))
    random.Random(seed).shuffle(ordered)
    return ordered


def too_large(shape: LinearShape, device: Device, *, on_grid: bool, taken_gib: float = 0.0) -> str | None:
    """Why a shape is left out on this device, or None. Time limits only a grid, whose corners nobody asked for.

    taken_gib: of the device's memory, by other processes that measure.
    """
    budget = KINDS[device.kind].defaults.max_point_flop
    if on_grid and shape.flop > budget:
        return f"{shape.flop:.2g} FLOP, more than {budget:.2g} a point"
    needed_gib = point_memory_bytes(shape) / 2**30
    if needed_gib > device.memory_gib * MAX_MEMORY_SHARE - taken_gib:
        return f"needs about {needed_gib:.0f} GiB of {device.memory_gib - taken_gib:.1f}"
    return None


def point_memory_bytes(shape: LinearShape) -> int:
    """Operands, then for each of 4 arms its bf16 results and float8 copies of every operand in both layouts."""
    elements = shape.m * shape.k + shape.k * shape.n + shape.m * shape.n
    return elements * (2 + 4 * (2 + 2))


def _axis(sizes: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(sizes)))
