"""Numbers in the documents that a script prints are those that it prints today."""

from __future__ import annotations

import re
import sys

import pytest
from documents import ROOT, page_text

from fp8gate import read_table
from fp8gate.filter.contract.recipes import RECIPES

COMPARISON, LIMITS, PLANS = page_text("comparison.md"), page_text("limits.md"), page_text("plans.md")
TORCHAO = "torchao's rule"
LOOKUP = " ".join((ROOT / "filter" / "decision" / "lookup.py").read_text().split())


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in (
        "two_sweeps",
        "against_torchao_rule",
        "grid_density",
        "unaligned_tokens",
        "tp_block_output",
        "plan_choices",
    ):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("device", ["nvidia-h200", "nvidia-h100-80gb-hbm3"])
def test_how_far_two_sweeps_agree(device):
    import two_sweeps

    printed = two_sweeps.compare(*sweeps_of(device))
    (row,) = (line for line in printed.splitlines() if line.startswith("| all "))
    speedups, median, _, p95, worst = (cell.strip() for cell in row.split("|")[2:7])
    flips = re.search(r"^(\d+) decisions at ([\d.]+) flip:", printed, flags=re.M)
    rounded = (f"{float(percent.rstrip('%')):.1f} %" for percent in (median, p95, worst))
    within = "{} (median), {} (95th percentile) and {} (worst)".format(*rounded)
    assert f"agree within {within} over {speedups} speedups" in LIMITS
    assert f"over {speedups} speedups, and in all but {flips[1]} decisions at {flips[2]}" in LIMITS


def test_what_bounds_from_repeats_cover_and_how_wide_they_are():
    import two_sweeps

    _, shares, draws, halves = columns(two_sweeps.coverage(*sweeps_of("nvidia-h200")))
    assert min(shares) > 95
    assert min(draws) > 80
    assert max(halves) < 10.5


def test_what_the_stated_bounds_of_two_h100_sweeps_cover_of_each_other():
    import two_sweeps

    stated, *_ = columns(two_sweeps.coverage(*sweeps_of("nvidia-h100-80gb-hbm3")))
    below, above = ([x for i in range(a, len(stated), 4) for x in stated[i : i + 2]] for a in (0, 2))
    covered = "cover {:.0f} to {:.0f} % of the other's speedups from 120 us on, and {:.0f} to {:.0f} % below"
    assert covered.format(min(above), max(above), min(below), max(below)) in LIMITS
    halves = [t.protocol.bounds for t in map(read_table, sorted(sweeps_of("nvidia-h100-80gb-hbm3")[0].glob("*.yaml")))]
    assert [round(100 * bound.from_120_us.between) for bound in halves] == [5, 6, 6]
    assert "5 to 6 %, and of 12 to 14 % where bf16 takes less than 120 us" in LIMITS
    assert {round(100 * bound.below_120_us.between) for bound in halves} == {12, 14}


def test_what_the_rules_lose_against_the_plans_of_an_h100():
    import plan_choices

    plans = list(plan_choices.packaged_plans("NVIDIA H100 80GB HBM3"))
    lines = plan_choices.losses(plans).splitlines()[2:]
    rows = {
        cells[0].strip(): [cell.strip().replace("%", " %") for cell in cells[-3:-1]]
        for line in lines
        if (cells := line.split("|")[1:])
    }
    said = (
        "The five blocks of an H100 came after the rule too: there the filter's set takes {} more time than the plan's "
        "(worst {}), 1.05x for all {} ({}), 1.00x for all {} ({}), and torchao's rule {} ({})."
    )
    rules = ("the filter's default", "1.05 for all", "1.00 for all", "torchao's rule")
    assert said.format(*(cell for rule in rules for cell in rows[rule])) in PLANS
    assert len(plans) == 5


def test_the_order_of_a_plans_sets_holds_with_communication():
    import tp_block_output

    told, gains = {}, {}
    for file in (ROOT / "benchmarks" / "data" / "tp-block").glob("*.jsonl"):
        setup, visits = tp_block_output.read_journal(file)
        lines = tp_block_output.headline(setup, visits).splitlines()
        rows = [[cell.strip() for cell in line.split("|")] for line in lines if "|" in line]
        gains[setup.model] = {name: row[4].split("%")[0] for row in rows for name in row[1].split(", ")}
        printed = tp_block_output.report(setup, visits)
        assert "No set is faster than the plan's beyond the noise." in printed
        (found,) = re.findall(r"tells (\d+ of \d+) pairs of sets apart; .* plan's order, 0 swapped\.", printed)
        told[setup.model] = found
    said = (
        f"tells {told['llama3-8b']} pairs of sets apart for the 8B widths, and {told['llama3-70b']} for the 70B widths"
    )
    assert said in PLANS
    large, small = gains["llama3-70b"], gains["llama3-8b"]
    assert large["table"] == large[TORCHAO]
    assert f"gains {large['table'][1:]} % by it, and {large['all'][1:]} % with all linears in float8" in COMPARISON
    assert (
        f"gains {small['table'][1:]} % by table and plan (w1, w3), and loses {small[TORCHAO][1:]} % by torc"
        in COMPARISON
    )
    assert f"whose layer gains {small['plan'][1:]} %" in LIMITS


def sweeps_of(device):
    """The folders of its tables and of its second sweep."""
    return ROOT / "thresholds" / device, ROOT / "benchmarks" / "data" / f"{device}-second-sweep"


def columns(coverage):
    """Stated coverage, that of 40 repeats, draws that cover 95 %, half widths: the numbers of all rows, both ways."""
    rows = [[cell.strip().split(", ") for cell in line.split("|")[1:-1]] for line in coverage.splitlines()[2:]]
    return [[float(x.rstrip("%")) for row in rows for x in row[i]] for i in (3, 5, 6, 7)]


@pytest.mark.filterwarnings("ignore::fp8gate.StaleTableWarning")
@pytest.mark.parametrize(("min_speedup", "texts"), [(1.0, [COMPARISON, LOOKUP]), (1.05, [LOOKUP])])
def test_what_the_choice_of_lookup_rests_on(min_speedup, texts):
    import against_torchao_rule

    printed = against_torchao_rule.compare("NVIDIA H200", None, min_speedup)
    losses = {
        lookup: [
            line.split("|")[4].strip().rstrip("%") for line in printed.splitlines() if f"fp8gate, {lookup}" in line
        ]
        for lookup in ("interpolate", "nearest")
    }
    ours, theirs = ("{}, {} and {} %".format(*losses[lookup]) for lookup in ("interpolate", "nearest"))
    for text in texts:
        assert f"{ours} against {theirs}" in text or f"is {ours}, the nearest point's {theirs}" in text


@pytest.mark.parametrize(("device", "name"), [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200")])
def test_what_tokens_that_are_no_multiple_of_128_cost(device, name):
    import unaligned_tokens

    printed = unaligned_tokens.compare(device)
    rows = [[cell.strip().replace("%", " %") for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:]]
    by_tokens = {(row[0], row[1]): row for row in rows}
    for recipe in RECIPES:
        plain, with_factor = (by_tokens[recipe, f"others{more}"] for more in ("", ", factor of the others"))
        row = f"| {name}, `{recipe}` | {plain[3]} | {plain[8]} of {plain[6]} shapes | {with_factor[8]} |"
        assert row in COMPARISON


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fp8gate.StaleTableWarning")
def test_what_a_coarser_grid_would_cost():
    import grid_density

    printed = grid_density.compare("NVIDIA H200")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:]]
    for axis, text in (
        ("M", "With half of the grid's M left out, interpolation is right for {} (nearest: {})"),
        ("K", "with half of K for {} ({})"),
        ("N", "with half of N for {} ({}; `python benchmarks/grid_density.py`)"),
    ):
        of_axis = [row for row in rows if row[1] == f"half of {axis}"]
        shares = (
            sorted(int(row[4].split("%")[0]) for row in of_axis if row[2] == lookup)
            for lookup in ("interpolate", "nearest")
        )
        assert text.format(*(f"{found[0]} to {found[-1]} %" for found in shares)) in COMPARISON
    everything = [row for row in rows if (row[1], row[2]) == ("all", "interpolate")]
    off, aligned = (
        "{}, {} and {} %".format(*(round(float(row[column].rstrip("%"))) for row in everything)) for column in (7, 8)
    )
    assert f"The predicted speedup itself is within {off} (tensorwise, rowwise, rowwise_with_gw_hp)" in COMPARISON
    assert f"and within {aligned} where the tokens are a multiple of 128" in COMPARISON
