"""Numbers in the documents that a script prints are those that it prints today."""

from __future__ import annotations

import re
import sys
from statistics import mean

import pytest
from documents import ROOT, page_text

from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.decision.estimate import OF_ALIGNED

CASTS, COMPARISON, LIMITS, PLANS = map(page_text, ("casts.md", "comparison.md", "limits.md", "plans.md"))
README, CHANGES = (" ".join((ROOT / name).read_text().split()) for name in ("README.md", "CHANGELOG.md"))
TORCHAO = "torchao's rule"
H100 = "nvidia-h100-80gb-hbm3"
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
        "train_titan_output",
        "plan_choices",
    ):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("device", ["nvidia-h200", H100])
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
    assert max(halves) < 11.5  # they have the constant of H100 boards, which these two do not show


def test_what_the_stated_bounds_of_h100_sweeps_cover_and_how_wide_they_are():
    import two_sweeps

    first, second = sweeps_of(H100)
    packaged, older = ROOT / "thresholds" / H100, second.with_name(f"{H100}-older-sweep")
    (below, above), (small, large) = stated(two_sweeps.coverage(first, second))
    assert f"cover {range_of(above)} of each other from 120 us on, and {range_of(below)} below" in LIMITS
    (below, above), (merged_small, merged_large) = stated(two_sweeps.coverage(packaged, older))
    assert f"cover {range_of(above[::2])} from 120 us on, and {range_of(below[::2])} below" in LIMITS
    assert f"of {range_of(large)}, and of {range_of(small)} where bf16 takes less than 120 us; merged" in LIMITS
    assert f"packaged, {range_of(merged_large[::2])} and {range_of(merged_small[::2])}" in LIMITS


def stated(coverage):
    """What the stated bounds cover, and their half widths: each below 120 us and from there on, both ways."""
    rows = [[cell.strip().split(", ") for cell in line.split("|")[1:-1]] for line in coverage.splitlines()[2:]]
    return [[[float(x.rstrip("%")) for row in rows[i::2] for x in row[column]] for i in (0, 1)] for column in (3, 4)]


def range_of(percents):
    low, high = (f"{one:.0f}" for one in (min(percents), max(percents)))
    return f"{low} %" if low == high else f"{low} to {high} %"


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
        "The blocks of an H100 came after the rule too: there the filter's set takes {} more time than the "
        "plan's (worst {}), 1.05x for all {} ({}), 1.00x for all {} ({}), and torchao's rule {} ({})."
    )
    rules = ("the filter's default", "1.05 for all", "1.00 for all", "torchao's rule")
    assert said.format(*(cell for rule in rules for cell in rows[rule])) in PLANS


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


def test_what_float8_gained_in_torchtitan():
    import train_titan_output

    gains, speeds, apart = {}, {}, []
    for name, header, visits in trained_in_torchtitan(train_titan_output):
        lines = train_titan_output.report(header, visits).splitlines()
        rows = {cells[0]: cells[1:] for line in lines if (cells := [cell.strip() for cell in line.split("|")[1:-1]])}
        for run in header.runs:
            _, speed, gain, of_visits, *_ = rows[run.name]
            gains |= {(name, choice, run.variant): gain.replace("%", " %") for choice in run.choices}
            speeds |= {(name, choice, run.variant): float(speed) for choice in run.choices}
            found = [float(one.strip("%")) for one in of_visits.split(", ")]
            apart.append(max(found) - min(found))
    small, full, large = "8b tp2 selective", "8b tp2 full", "70b tp2 selective"
    assert gains[small, "table", None] == gains[small, "plan", None] == "+1.4 %"
    assert "to 1.4 % faster than in bf16" in README
    assert (gains[small, "rule-shards", None], gains[small, "rule", None]) == ("-0.3 %", "-1.4 %")
    assert "By torchao's rule they train 0.3 to 1.4 % slower, and with everything converted 1.4 % slower" in README
    assert gains[small, "all", None] == "-1.4 %"
    assert gains[large, "rule", None] == gains[large, "plan", None] == "+8.1 %"
    assert "4 layers of the 70B widths gain 8.1 %, also by the rule" in README
    assert [gains[full, choice, None] for choice in ("rule", "rule-shards", "table")] == ["+1.0 %", "+2.1 %", "+3.1 %"]
    assert "and 3.1 % with full recomputation, where it gains 1.0 to 2.1 %" in CHANGES
    gw_hp = "8b tp2 selective rowwise_with_gw_hp"
    found = [gains[gw_hp, choice, None][1:] for choice in ("table", "all")]
    assert "gains {} by the table (w1, w2, w3), and 2.2 % with".format(*found) in PLANS
    assert found[1] == "2.2 %"
    with_async = speeds[small, "plan", "async TP"] / speeds[small, "bf16", "async TP"] - 1
    assert f"gains 1.4 %, and {100 * with_async:.1f} % with asynchronous" in PLANS
    assert f"gains of the same choice by {max(apart):.1f} points or less" in PLANS
    rates = [f"{speeds[large, choice, None]:.0f}" for choice in ("bf16", "plan")]
    assert "bf16 14039 tokens/s a rank without and {} with, fp8gate's set 15232 and {}".format(*rates) in PLANS


def test_what_the_casts_gain_in_torchtitan():
    import train_titan_output

    speeds, losses, tries_all = {}, {}, {}
    for name, header, visits in trained_in_torchtitan(train_titan_output, "train-titan-casts"):
        names = {(choice, run.variant): run.name for run in header.runs for choice in run.choices}
        for place, run in names.items():
            found = [one for one in visits if one.run == run]
            if "all" in {choice for choice, _ in names}:
                tries_all[place] = [train_titan_output.tokens_per_s(header.setup, one) for one in found]
                continue
            (visit,) = found
            speeds[(name, *place)] = train_titan_output.tokens_per_s(header.setup, visit)
            losses[(name, *place)] = visit.steps[-1].loss

    def gain(name, choice, variant, over=("bf16", None)):
        return f"{100 * (speeds[name, choice, variant] / speeds[(name, *over)] - 1):.1f}"

    tp, fsdp, graphs, ours = "8b tp2 selective", "8b fsdp2 selective", "without CUDA graphs", "fp8gate casts"
    without = ("bf16", graphs)
    assert f"widths train {gain(tp, 'plan', None)} to 1.4 % faster than in bf16, and without" in README
    assert f"without torchtitan's CUDA graphs {gain(tp, 'plan', graphs, without)} %" in README
    ranges = [f"from {gain(name, 'table', None)} to {gain(name, 'table', ours)} %" for name in (fsdp, tp)]
    assert "{} under FSDP, and {} under TP 2".format(*ranges) in README
    assert f"[{gain(tp, 'plan', graphs, without)} % faster](plans.md" in LIMITS
    assert f"bf16 trains {gain(tp, *without)} % faster without them" in PLANS
    assert f"fp8gate's set {gain(tp, 'plan', graphs, ('plan', None))} % faster, which is" in PLANS
    assert f"which is {gain(tp, 'plan', graphs, without)} % ahead of that bf16" in PLANS
    for name, said in (
        (fsdp, "{} tokens per second, instead of {} with Inductor's casts and {} in bf16"),
        (tp, "{}, instead of {} and {}"),
    ):
        places = (("table", ours), ("table", None), ("bf16", None))
        assert said.format(*(f"{speeds[(name, *place)]:.0f}" for place in places)) in CASTS
    bf16, table = (f"{speeds[tp, choice, graphs]:.0f}" for choice in ("bf16", "plan"))
    assert f"bf16 has {bf16} tokens per second, and fp8gate's set with Inductor's casts {table}" in CASTS
    below, above = (losses[name, "table", ours] - losses[name, "bf16", None] for name in (fsdp, tp))
    usual = [losses[name, "table", None] - losses[name, "bf16", None] for name in (fsdp, tp)]
    assert f"are {-below:.3f} below bf16's (FSDP) and {above:.3f} above (TP 2)" in CASTS
    assert "the loss is {:.3f} and {:.3f} above".format(*usual) in CASTS
    (bf16,) = tries_all["bf16", None]
    with_casts, without = (100 * (tries_all["all", variant][0] / bf16 - 1) for variant in (ours, None))
    assert f"all linears, converted, gain {with_casts:.1f} % with the casts, and lose {-without:.1f} % with" in CASTS


def test_what_the_casts_gain_in_a_model_on_one_gpu():
    import train_llama_output

    header, visits = train_llama_output.read_last_benchmark(
        ROOT / "benchmarks" / "data" / "train-llama-casts" / f"{H100}-rowwise.jsonl"
    )
    lines = train_llama_output.gains(header, visits).splitlines()
    rows = {cells[1]: cells for cells in map(cells_of, lines)}
    gained, loss = rows["plan; fp8gate's casts"][4].partition(" ")[0], 7
    ends = sorted(float(rows[name][loss]) for name in ("bf16", "bf16, weights 1", "bf16, weights 2"))
    assert f"and {gained[1:].replace('%', ' %')} are there" in CASTS
    assert f"initial weights end between {ends[0]:.3f} and {ends[-1]:.3f}" in CASTS
    assert "so do all in float8" in train_llama_output.report(header, visits)
    layers_s = header.layers * 20.96e-3
    share = layers_s / (header.tokens / float(rows["bf16"][3]))
    assert f"three layers are {100 * share:.0f} % of such a step" in CASTS
    assert f"would be {100 * (1 / (1 - share * (1 - 1 / 1.193)) - 1):.1f} % here" in CASTS


def cells_of(line):
    return [cell.strip() for cell in line.split("|")]


def test_losses_in_torchtitan_follow_those_of_bf16():
    import train_titan_output

    far, last, own, ours, in_gw_hp = [], [], [], [], []
    for name, _, visits in trained_in_torchtitan(train_titan_output):
        bf16 = [[step.loss for step in visit.steps] for visit in visits if visit.run == "bf16"]
        usual = [mean(losses) for losses in zip(*bf16, strict=True)]
        for visit in visits:
            away = [step.loss - loss for step, loss in zip(visit.steps, usual, strict=True)]
            far += map(abs, away)
            last.append(abs(away[-1]))
            if visit.run == "bf16":
                own += map(abs, away)
            elif name.endswith("gw_hp"):
                in_gw_hp.append(away[-1])
            elif visit.run.startswith("fp8gate") and name.startswith("8b tp2"):
                ours.append(away[-1])
    assert f"at most {max(far):.2f} from bf16's at the steps that are logged" in PLANS
    assert f"At step 40 they are at most {max(last):.3f} apart" in PLANS
    assert f"is {min(ours):.3f} to {max(ours):.3f} above bf16 in all six visits" in PLANS
    assert len(ours) == 6
    assert "fp8gate's set is {1:.3f} above, all float8 {0:.3f} above".format(*sorted(in_gw_hp)) in PLANS
    assert f"bf16 differs from itself by {2 * max(own):.3f} at most" in PLANS


def trained_in_torchtitan(output, folder="train-titan"):
    """Each journal: its model, degree, recomputation, and recipe if not rowwise; its header; its visits."""
    for file in sorted((ROOT / "benchmarks" / "data" / folder).glob("*.jsonl")):
        header, visits = output.read_journal(file)
        setup = header.setup
        degree = f"tp{setup.tp}" if setup.tp > 1 else f"fsdp{setup.fsdp}"
        parts = [setup.widths.partition("-")[2], degree, setup.recompute, setup.recipe]
        yield " ".join(parts).removesuffix(" rowwise"), header, visits


def sweeps_of(device):
    """The folders of two sweeps of its default grid."""
    data = ROOT / "benchmarks" / "data"
    first = data / f"{device}-first-sweep"
    return first if first.exists() else ROOT / "thresholds" / device, data / f"{device}-second-sweep"


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
        stated = next((row[8] for (of, tokens), row in by_tokens.items() if of == recipe and "times" in tokens), "none")
        row = f"| {name}, `{recipe}` | {plain[3]} | {plain[8]} of {plain[6]} shapes | {with_factor[8]} | {stated} |"
        assert row in COMPARISON


def test_how_much_faster_multiples_of_128_are_said_to_be():
    rows = re.findall(r"\| H[12]00, `\w+` \| ([\d.]+) % \|", COMPARISON)
    assert len(rows) == 6
    low, high = (round(apart(map(float, rows))) for apart in (min, max))
    assert f"float8 is {low} to {high} % faster" in OF_ALIGNED


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
