"""Tables of sweeps that were stopped: how they are written and read, and what each part of fp8gate makes of them."""

from __future__ import annotations

import json
import random
import warnings
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from builders import make_point, make_table, write_file, write_folder
from typer.testing import CliRunner

from fp8gate import IncompleteTableWarning, TableError, auto_filter, read_table
from fp8gate.calibrate.comparison.merge import merge_tables
from fp8gate.calibrate.comparison.usual_models import shown_models
from fp8gate.cli import app
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Grid, Incomplete, format_table
from fp8gate.filter.decision.decide import decide
from fp8gate.filter.decision.lookup import LOOKUPS, Lookup
from fp8gate.filter.locate.incomplete_table import incomplete_remark

THRESHOLDS = Path(__file__).parents[1] / "thresholds"
HALF = Incomplete(measured=4, of=8)
GRID = Grid(m=(1024, 4096), k=(1024, 4096), n=(1024, 4096))


def incomplete_table(*points, **fields):
    return make_table(*points, **{"grid": GRID, "incomplete": HALF, **fields})


@dataclass(frozen=True)
class LinearConfig:
    in_features: int
    out_features: int


# --- the file --------------------------------------------------------------------------------------------------


def test_the_header_says_how_far_the_sweep_came(tmp_path):
    table = incomplete_table(make_point(1024, 1024, 1024))
    path = write_file(table, tmp_path / "t.yaml")
    assert "\nincomplete: {measured: 4, of: 8}\ngrid: " in path.read_text()
    assert read_table(path).incomplete == HALF
    assert format_table(read_table(path)) == path.read_text()


@pytest.mark.parametrize(
    "path", sorted(THRESHOLDS.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_a_complete_table_is_written_as_before(path):
    table = read_table(path)
    assert table.incomplete is None
    assert format_table(table) == path.read_text()


@pytest.mark.parametrize(
    ("stated", "complaint"),
    [
        ("{measured: 8, of: 8}", r"\$\.incomplete\.measured: expected fewer than \$\.incomplete\.of, 8; found 8"),
        ("{measured: 9, of: 8}", r"\$\.incomplete\.measured: expected fewer than \$\.incomplete\.of, 8; found 9"),
        ("{measured: 0, of: 8}", r"`int` >= 1 - at `\$\.incomplete\.measured`"),
        ("{measured: -1, of: 8}", r"`int` >= 1 - at `\$\.incomplete\.measured`"),
        ("{measured: 4.5, of: 8}", r"Expected `int`, got `float` - at `\$\.incomplete\.measured`"),
        ("{measured: 4}", r"missing required field `of` - at `\$\.incomplete`"),
        ("{measured: 4, of: 8, why: Ctrl-C}", r"unknown field `why` - at `\$\.incomplete`"),
        ("true", r"Expected `object \| null`, got `bool` - at `\$\.incomplete`"),
    ],
)
def test_what_it_says_is_checked(tmp_path, stated, complaint):
    path = write_file(incomplete_table(make_point(1024, 1024, 1024)), tmp_path / "t.yaml")
    path.write_text(path.read_text().replace("{measured: 4, of: 8}", stated))
    with pytest.raises(TableError, match=rf"t\.yaml: .*{complaint}"):
        read_table(path)


# --- what it answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lookup", LOOKUPS)
@pytest.mark.parametrize("incomplete", [HALF, None])
def test_a_larger_point_that_wins_proves_nothing(lookup, incomplete):
    """All other points of the grid are missing. The complete table takes the only point there is for the border."""
    table = incomplete_table(make_point(4096, 4096, 4096, 1.5), incomplete=incomplete)
    decision = decide(LinearShape(2048, 2048, 2048), Lookup(table, lookup), min_speedup=1.05)
    assert (decision.convert, decision.outside) == (incomplete is None, True)
    if incomplete:
        assert decision.is_unsure
        assert decision.reason.startswith("no shape as small was measured yet, nearest (4096, 4096, 4096), outside")


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_a_larger_point_that_loses_is_below_as_ever(lookup):
    table = incomplete_table(make_point(4096, 4096, 4096, 0.9))
    decision = decide(LinearShape(2048, 2048, 2048), Lookup(table, lookup), min_speedup=1.05)
    assert not decision.convert
    assert not decision.is_unsure
    assert decision.reason.startswith("below 1.05x")


@pytest.mark.parametrize("lookup", LOOKUPS)
@pytest.mark.parametrize(("smaller", "converts"), [(1.2, True), (0.9, False)])
def test_a_shape_gains_what_a_smaller_one_does(lookup, smaller, converts):
    """The nearest point is larger, and faster still."""
    table = incomplete_table(make_point(1024, 1024, 1024, smaller), make_point(4096, 4096, 4096, 1.5))
    decision = decide(LinearShape(3072, 3072, 3072), Lookup(table, lookup), min_speedup=1.05)
    assert (decision.convert, decision.speedup) == (converts, smaller)
    assert decision.point.shape == LinearShape(1024, 1024, 1024)


def test_a_nearest_point_that_is_slower_counts():
    table = incomplete_table(make_point(1024, 1024, 1024, 1.5), make_point(4096, 4096, 4096, 0.9))
    decision = decide(LinearShape(3072, 3072, 3072), Lookup(table), min_speedup=1.05)
    assert (decision.convert, decision.speedup) == (False, 0.9)


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_what_was_measured_is_answered_as_in_a_complete_table(lookup):
    """A point itself, and a shape whose surrounding points are all there."""
    points = [make_point(4096, k, n, 1.1 + k / 10000) for k in GRID.k for n in GRID.n]
    part, whole = incomplete_table(*points), incomplete_table(*points, incomplete=None)
    for shape in (LinearShape(4096, 1024, 4096), LinearShape(4096, 2048, 2048)):
        answers = [decide(shape, Lookup(table, lookup), min_speedup=1.05) for table in (part, whole)]
        assert answers[0] == answers[1]
        assert answers[0].convert


@pytest.mark.parametrize("lookup", LOOKUPS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_part_of_a_table_claims_a_win_that_the_whole_table_denies(recipe, lookup):
    """As a sweep that was stopped leaves them: random parts of the H200's tables, asked about the bundled models."""
    whole = read_table(THRESHOLDS / "nvidia-h200" / f"{recipe}.yaml")
    shapes = sorted({shape for model in shown_models() for m in (2048, 8192) for shape in model.shapes(m).values()})
    speedups = {shape: Lookup(whole)(shape).speedup for shape in shapes if not shape.indivisible()}
    losers = [shape for shape, speedup in speedups.items() if speedup < 1.0]
    assert losers
    converted = 0
    for share in (0.02, 0.1, 0.25, 0.5, 0.75):
        points = sorted(random.Random(7).sample(whole.points, round(share * len(whole.points))), key=lambda p: p.shape)
        find = Lookup(msgspec.structs.replace(whole, points=tuple(points), incomplete=HALF), lookup)
        answers = {shape: decide(shape, find, min_speedup=1.05) for shape in speedups}
        assert not [shape for shape in losers if answers[shape].convert]
        converted += sum(answer.convert for answer in answers.values())
    assert converted > 0.5 * 5 * sum(speedup >= 1.05 for speedup in speedups.values())


# --- who says so -----------------------------------------------------------------------------------------------


def test_the_filter_says_it_once_whatever_the_models(tmp_path):
    path = write_file(incomplete_table(make_point(1024, 1024, 1024, 1.5)), tmp_path / "rowwise.yaml")
    with pytest.warns(IncompleteTableWarning, match="stopped after 4 of 8 measurements"):
        wants_float8 = auto_filter("rowwise", tokens=1024, tables=path)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error", IncompleteTableWarning)
            findings = wants_float8.check([("w1", LinearConfig(1024, 1024))])
        assert [finding.category for finding in findings] == [IncompleteTableWarning]
    assert "the table is incomplete, with 4 of 8 measurements" in wants_float8.summary()


def test_it_says_what_completes_it(tmp_path, monkeypatch):
    table = incomplete_table(make_point(1024, 1024, 1024))
    path = write_file(table, tmp_path / "thresholds" / "nvidia-h200" / "rowwise.yaml")
    begun = "run on NVIDIA H200 with the options that it was begun with: fp8gate calibrate"
    by_grid = f"--recipes rowwise --grid {path}"
    monkeypatch.setenv("FP8GATE_THRESHOLDS", str(tmp_path / "thresholds"))
    assert incomplete_remark(table, path).endswith(f"{begun}; or, for its grid alone: fp8gate calibrate {by_grid}")
    assert incomplete_remark(msgspec.structs.replace(table, grid=Grid()), path).endswith(begun)
    for elsewhere in (tmp_path / "elsewhere", path):  # a file cannot be written to without --out
        monkeypatch.setenv("FP8GATE_THRESHOLDS", str(elsewhere))
        told = f"fp8gate calibrate --out {tmp_path / 'thresholds'}"
        assert incomplete_remark(table, path).endswith(f"for its grid alone: {told} {by_grid}")
    assert incomplete_remark(msgspec.structs.replace(table, incomplete=None), path) is None


@pytest.fixture
def two_places(tmp_path, monkeypatch):
    """The checkout's thresholds, which are searched first, and the user's."""
    monkeypatch.delenv("FP8GATE_THRESHOLDS", raising=False)
    checkout, users = tmp_path / "checkout", tmp_path / "users"
    users.mkdir()
    (checkout / "thresholds").mkdir(parents=True)
    monkeypatch.setattr("fp8gate.filter.locate.places.checkout_thresholds", lambda: checkout / "thresholds")
    monkeypatch.setattr("fp8gate.filter.locate.places.user_thresholds", lambda: users)
    return checkout / "thresholds", users


def warnings_of(**options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wants_float8 = auto_filter("rowwise", tokens=1024, device="NVIDIA X", **options)
    return [str(warning.message) for warning in caught], wants_float8.path


@pytest.mark.parametrize("second", ["complete", "incomplete", "broken", "none"])
def test_a_complete_table_of_a_later_place_is_named_and_not_taken(two_places, second):
    first, later = two_places
    device = msgspec.structs.replace(make_table(make_point(16, 32, 48)).device, name="NVIDIA X")
    write_folder(first, incomplete_table(make_point(1024, 1024, 1024), device=device))
    path = later / "nvidia-x" / "rowwise.yaml"
    if second != "none":
        incomplete = HALF if second == "incomplete" else None
        write_folder(later, incomplete_table(make_point(1024, 1024, 1024), device=device, incomplete=incomplete))
    if second == "broken":
        path.write_text("schema: 0\n")
    (message,), found = warnings_of()
    assert found == first / "nvidia-x" / "rowwise.yaml"
    assert message.endswith(f"comes after it, by --tables, or tables= in Python: {path}") == (second == "complete")
    assert message.count("tables=") == (second == "complete")


def test_a_complete_table_is_taken_without_a_word_whatever_comes_later(two_places):
    first, later = two_places
    device = msgspec.structs.replace(make_table(make_point(16, 32, 48)).device, name="NVIDIA X")
    write_folder(first, incomplete_table(make_point(1024, 1024, 1024), device=device, incomplete=None))
    write_folder(later, incomplete_table(make_point(1024, 1024, 1024), device=device))
    assert warnings_of() == ([], first / "nvidia-x" / "rowwise.yaml")


@pytest.fixture
def folder(tmp_path):
    """A thresholds folder with an incomplete table of rowwise, and a complete one of tensorwise."""
    points = [make_point(m, k, n, 1.5) for m in GRID.m for k in GRID.k for n in GRID.n]
    return write_folder(
        tmp_path / "tables",
        incomplete_table(*points[:5]),
        incomplete_table(*points, recipe="tensorwise", incomplete=None),
    )


def fp8gate(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize(("recipe", "says_so"), [("rowwise", True), ("tensorwise", False)])
def test_explain_says_so(folder, recipe, says_so):
    asked = ("explain", "llama3-8b", "--recipe", recipe, "--tokens", "4096", "--tables", folder, "--device", "H200")
    assert ("is incomplete, its sweep was stopped after 4 of 8 measurements" in fp8gate(*asked).stdout) == says_so
    categories = [finding["category"] for finding in json.loads(fp8gate(*asked, "--json").stdout)["findings"]]
    assert ("IncompleteTableWarning" in categories) == says_so


def test_verify_names_it(folder):
    path = folder / "nvidia-h200" / "rowwise.yaml"
    expected = f"2 tables read and checked, of which incomplete: {path} (4 of 8 measurements)\n"
    assert fp8gate("verify", "--files", "--tables", folder).stdout == expected
    told = json.loads(fp8gate("verify", "--files", "--tables", folder, "--json").stdout)
    assert told["incomplete"] == {str(path): {"measured": 4, "of": 8}}
    path.unlink()
    assert fp8gate("verify", "--files", "--tables", folder).stdout == "1 tables read and checked\n"


def test_diff_names_it(folder, tmp_path):
    part = folder / "nvidia-h200" / "rowwise.yaml"
    whole = write_file(msgspec.structs.replace(read_table(part), incomplete=None), tmp_path / "whole.yaml")
    titles = [
        fp8gate("diff", before, after).stdout.splitlines()[0] for before, after in ((part, whole), (whole, whole))
    ]
    assert [title.count("4 of 8 measurements") for title in titles] == [1, 0]
    (compared,) = json.loads(fp8gate("diff", part, whole, "--json").stdout)["comparisons"]
    assert (compared["before"]["incomplete"], compared["after"]["incomplete"]) == ({"measured": 4, "of": 8}, None)


def test_a_merged_table_is_incomplete_if_one_of_them_is(tmp_path):
    one = make_table(make_point(16, 32, 48))
    two = incomplete_table(make_point(16, 32, 64))
    three = incomplete_table(make_point(16, 32, 80), incomplete=Incomplete(measured=1, of=9))
    assert merge_tables({"one": one, "other": make_table(make_point(16, 32, 80))}).incomplete is None
    assert merge_tables({"one": one, "two": two}).incomplete == HALF
    assert merge_tables({"two": two, "three": three, "one": one}).incomplete == Incomplete(measured=5, of=17)
    files = [write_file(table, tmp_path / f"{i}.yaml") for i, table in enumerate((one, two))]
    said = fp8gate("merge", *files, "--out", tmp_path / "all.yaml").stdout
    assert f"incomplete, as {files[1]} is, with 4 of 8 measurements: complete that one and merge again\n" in said
    assert read_table(tmp_path / "all.yaml").incomplete == HALF


@pytest.mark.parametrize(("recipe", "says_so"), [("rowwise", True), ("tensorwise", False)])
def test_the_report_says_so_at_its_top(folder, tmp_path, recipe, says_so):
    result = fp8gate("report", folder / "nvidia-h200" / f"{recipe}.yaml", "--out", tmp_path / "report")
    assert result.exit_code == 0, result.output
    page = " ".join((tmp_path / "report" / "index.html").read_text().split())
    assert ("Measured in part, as the sweep was stopped: rowwise (4 of 8 measurements). The maps" in page) == says_so
