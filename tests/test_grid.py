"""Which shapes are measured: named grids, grid files, the order, and what is left out."""

from __future__ import annotations

import pytest
from builders import make_point, make_table, write_file
from samples import CPU, GPU, replaced

from fp8gate.calibrate.device.registry import KINDS
from fp8gate.calibrate.grid.grid import (
    GridError,
    grid_shapes,
    load_grid,
    measuring_order,
    point_memory_bytes,
    too_large,
)
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Grid, TableError

SHAPES = [LinearShape(m, k, n) for m in (16, 32, 64) for k in (16, 48) for n in (16, 32)]
GRIDS = [(kind, name) for kind in KINDS for name in KINDS[kind].defaults.grids]


@pytest.fixture
def load(tmp_path):
    """Loads a grid file with this text; errors name it grid.yaml."""

    def load_text(text: str):
        path = tmp_path / "grid.yaml"
        path.write_text(text)
        return load_grid(str(path), "cpu")

    return load_text


def test_every_kind_has_the_grids_that_the_command_line_names():
    assert [(kind, name) for kind in ("cuda", "cpu") for name in ("quick", "default", "full")] == GRIDS


def test_the_default_gpu_grid_is_powers_of_two_over_the_whole_range():
    grid, shapes = load_grid("default", "cuda")
    assert grid.m == (1024, 2048, 4096, 8192, 16384, 65536)
    assert grid.k == (128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    assert grid.n == (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    assert shapes == []


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_quick_is_smaller_than_default(kind):
    quick, default = load_grid("quick", kind)[0], load_grid("default", kind)[0]
    assert 0 < len(grid_shapes(quick)) < len(grid_shapes(default))


@pytest.mark.parametrize(("kind", "name"), GRIDS)
def test_named_grids_can_be_measured(kind, name):
    grid, beside = load_grid(name, kind)
    shapes = grid_shapes(grid)
    assert beside == []
    assert [shape for shape in shapes if shape.indivisible()] == []
    if kind == "cpu":
        assert [shape for shape in shapes if too_large(shape, CPU, on_grid=True)] == []
    if (kind, name) == ("cuda", "default"):
        assert (
            sum(too_large(shape, GPU, on_grid=True) is None for shape in shapes) >= 400
        )  # as many as a table promises


def test_a_file_gives_axes_in_order_and_single_shapes(load):
    grid, shapes = load("m: [64, 16, 64]\nk: [32]\nn: [48, 16]\nshapes:\n  - [128, 16, 32]\n")
    assert grid == Grid(m=(16, 64), k=(32,), n=(16, 48))
    assert shapes == [LinearShape(128, 16, 32)]


def test_a_file_may_have_shapes_only(load):
    assert load("shapes: [[16, 32, 48], [32, 32, 32]]") == (
        Grid(),
        [LinearShape(16, 32, 48), LinearShape(32, 32, 32)],
    )


def test_grid_shapes_are_all_combinations():
    shapes = grid_shapes(Grid(m=(16, 32), k=(48,), n=(16, 64)))
    assert [str(shape) for shape in shapes] == [
        "(16, 48, 16)",
        "(16, 48, 64)",
        "(32, 48, 16)",
        "(32, 48, 64)",
    ]
    assert grid_shapes(Grid(m=(16,), k=(16,))) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        pytest.param("m: [16]\nk: [16]\nn: [100]", r"multiples of 16.*n = 100", id="axis not divisible"),
        pytest.param("shapes: [[16, 20, 16]]", r"\(16, 20, 16\).*k = 20", id="shape not divisible"),
        pytest.param("shapes: [[16, 16]]", r"length 3.*\$\.shapes\[0\]", id="shape too short"),
        pytest.param("m: [0]\nk: [16]\nn: [16]", r"\$\.m\[0\]", id="zero"),
        pytest.param("m: 16\nk: [16]\nn: [16]", r"array.*\$\.m", id="not a list"),
        pytest.param("m: [16.0]\nk: [16]\nn: [16]", r"int.*\$\.m\[0\]", id="not whole"),
        pytest.param("m: [sixteen]\nk: [16]\nn: [16]", r"int.*\$\.m\[0\]", id="not a number"),
        pytest.param("m: [16]\nk: [16]\nn: [16]\ntokens: [1]", r"tokens", id="unknown field"),
        pytest.param("m: [16]\nm: [32]\nk: [16]\nn: [16]", r"'m' is there twice", id="duplicate key"),
        pytest.param("m: [16]\nk: [16]", r"found no shape", id="an axis is missing"),
        pytest.param("{}", r"found no shape", id="no field"),
        pytest.param("", r"object.*null", id="empty file"),
        pytest.param("m: [16", r"not plain YAML", id="not YAML"),
        pytest.param("m: !!python/tuple [16]", r"not plain YAML", id="a tag"),
        pytest.param("m: [2147483648]\nk: [16]\nn: [16]", r"<= 2147483647 - at `\$\.m\[0\]`", id="above 32 bits"),
        pytest.param(f"m: [{10**320}]", r"\$\.m\[0\]: expected a finite number", id="320 digits"),
    ],
)
def test_errors_name_the_file_and_the_field(load, text, complaint):
    with pytest.raises(GridError, match=rf"(?s)grid\.yaml: .*{complaint}"):
        load(text)


def axis(sizes: int) -> str:
    return str([16 * (i + 1) for i in range(sizes)])


def test_combinations_are_counted_before_they_are_made(load):
    with pytest.raises(GridError, match=r"at most 100,000 combinations of m, k and n; found 27,000,000,000"):
        load(f"m: {axis(3000)}\nk: {axis(3000)}\nn: {axis(3000)}")
    with pytest.raises(GridError, match=r"found 100,001"):
        load(f"m: {axis(100)}\nk: {axis(100)}\nn: {axis(10)}\nshapes: [[16, 16, 16]]")


def test_as_many_combinations_as_a_table_holds_are_read(load):
    assert len(grid_shapes(load(f"m: {axis(100)}\nk: {axis(100)}\nn: {axis(10)}")[0])) == 100_000


def test_a_missing_file_is_neither_a_grid_nor_a_traceback(tmp_path):
    with pytest.raises(GridError, match=r"expected quick, default, full or a readable YAML file; got .*nosuch\.yaml"):
        load_grid(str(tmp_path / "nosuch.yaml"), "cpu")


def test_a_binary_file_is_an_error(tmp_path):
    (tmp_path / "grid.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GridError, match=r"readable YAML file; got .*grid\.yaml"):
        load_grid(str(tmp_path / "grid.yaml"), "cpu")


def test_measuring_order_has_each_shape_once():
    assert sorted(measuring_order([*SHAPES, *SHAPES], 0)) == sorted(SHAPES)


def test_measuring_order_is_that_of_the_seed_whatever_came_first():
    order = measuring_order(SHAPES, 0)
    assert order == measuring_order(reversed(SHAPES), 0)
    assert order != measuring_order(SHAPES, 1)
    assert order != sorted(SHAPES)


@pytest.mark.parametrize(
    ("device", "largest", "too_many"),
    [
        (CPU, LinearShape(512, 1024, 1024), LinearShape(528, 1024, 1024)),
        (GPU, LinearShape(8192, 16384, 16384), LinearShape(8208, 16384, 16384)),
    ],
)
def test_too_large_by_flop_is_a_limit_of_grids_only(device, largest, too_many):
    assert too_large(largest, device, on_grid=True) is None
    assert "FLOP" in too_large(too_many, device, on_grid=True)
    assert too_large(too_many, device, on_grid=False) is None


def test_too_large_by_memory():
    shape = LinearShape(8192, 8192, 16)  # 1.13 GiB by `point_memory_bytes`
    assert too_large(shape, replaced(GPU, memory_gib=1.0), on_grid=False) == "needs about 1 GiB of 1.0"
    assert (
        too_large(shape, replaced(GPU, memory_gib=1.2), on_grid=False) == "needs about 1 GiB of 1.2"
    )  # a tenth is kept free
    assert too_large(shape, replaced(GPU, memory_gib=1.3), on_grid=False) is None


def test_point_memory_is_that_of_operands_and_four_arms():
    elements = 16 * 32 + 32 * 48 + 16 * 48
    assert point_memory_bytes(LinearShape(16, 32, 48)) == 18 * elements


def test_a_table_is_a_grid_of_its_own_points(tmp_path):
    """So that what was measured can be measured again."""
    points = (make_point(16, 32, 48), make_point(16, 32, 64, status="noisy"), make_point(64, 96, 48))
    path = write_file(make_table(*points, grid=Grid(m=(16,), k=(32,), n=(48, 64))), tmp_path / "rowwise.yaml")
    grid, shapes = load_grid(str(path), "cpu")
    assert grid == Grid(m=(16,), k=(32,), n=(48, 64))
    assert shapes == [point.shape for point in points]


def test_a_table_that_breaks_its_format_is_no_grid(load):
    with pytest.raises(TableError, match=r"grid\.yaml: "):
        load("schema: 1\nrecipe: rowwise\n")
