"""The kernels that cast to both float8 forms, in Triton's interpreter on the CPU, and the benchmark that times them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

ROOT = Path(__file__).parent.parent
METHODS = {
    "two passes, row",
    "two passes, column",
    "two passes, column, column",
    "rows first, row",
    "strip, column",
    "panels, column",
}


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, tuple[int, int]]]:
    """For each test what was compared: how many scales and how many data differ."""
    command = [sys.executable, str(Path(__file__).parent / "interpreted_casts.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for line in run.stdout.splitlines():
        test, compared, scales, data = json.loads(line)
        results[test][compared] = (scales, data)
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("test", "least"),
    [("special", 15 * 7), ("blocks", 7 + 1 + 3), ("magnitudes", 2), ("operators", 11 * 3), ("given scales", 11 * 2)],
)
def test_every_bit_is_that_of_torchao(interpreted, test, least):
    found = interpreted[test]
    assert len(found) >= least
    assert {compared: counts for compared, counts in found.items() if counts != (0, 0)} == {}


@pytest.mark.slow
def test_every_way_is_compared(interpreted):
    assert {name for name in METHODS if not any(case.endswith(name) for case in interpreted["special"])} == set()


@pytest.mark.slow
def test_the_sweep_runs_every_launch(interpreted):
    import rowwise_casts_kernels as kernel

    strips = [name for name in interpreted["launches"] if name.startswith("column, strip")]
    assert len(strips) == len(kernel.STRIP_LAUNCHES)
    panels = [name for name in interpreted["launches"] if name.startswith("column, panels")]
    assert len(panels) == len(kernel.PANEL_LAUNCHES)
    assert (
        len(interpreted["launches"]) == len(strips) + len(panels) + 3
    )  # two passes to both forms and to one, rows first
    assert set(interpreted["launches"].values()) == {(0, 0)}


def test_differences_are_counted_in_scales_and_in_data():
    from rowwise_casts_equality import differences

    from fp8gate.casts.operand import Form

    def form(data: list[int], scale: list[float]) -> Form:
        as_float8 = torch.tensor([data], dtype=torch.uint8).view(torch.float8_e4m3fn)
        return Form(data=as_float8, scale=torch.tensor(scale))

    expected = form([1, 0x7F, 0, 0x80], [2.0, torch.nan])
    assert differences(form([1, 0xFF, 0, 0x80], [2.0, -torch.nan]), expected) == (0, 0)  # a NaN is a NaN
    assert differences(form([1, 0x7F, 0x80, 0x7F], [2.0, 0.0]), expected) == (1, 2)  # but -0 is not 0


def test_a_form_of_another_layout_is_refused():
    from rowwise_casts_equality import differences

    from fp8gate.casts.operand import Form

    data, scale = torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.ones(4, 1)
    with pytest.raises(ValueError, match=r"shape \(4, 4\) \(1, 4\), torchao's \(4, 4\) \(4, 1\)"):
        differences(Form(data=data.t(), scale=scale), Form(data=data, scale=scale))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(16, 16), "must be a contiguous bf16 matrix, not torch.float32"),
        (torch.zeros(16, 32, dtype=torch.bfloat16).t(), r"must be a contiguous bf16 matrix, .* \(1, 32\)"),
        (torch.zeros(16, dtype=torch.bfloat16), "must be a contiguous bf16 matrix"),
        (torch.zeros(24, 16, dtype=torch.bfloat16), r"multiples of 16 and not 0: \(24, 16\)"),
        (torch.zeros(0, 16, dtype=torch.bfloat16), r"multiples of 16 and not 0: \(0, 16\)"),
    ],
)
def test_other_operands_are_refused(x, message):
    from rowwise_casts_kernels import strip_column_form, two_pass_forms

    for cast in (strip_column_form, two_pass_forms):
        with pytest.raises(ValueError, match=message):
            cast(x, powers_of_two=True)


def test_rows_too_wide_for_registers_are_refused():
    from rowwise_casts_kernels import rows_first_forms

    with pytest.raises(ValueError, match="at most 16384 columns fit into registers, not 16400: use two_pass_forms"):
        rows_first_forms(torch.zeros(16, 16400, dtype=torch.bfloat16), powers_of_two=True)


def test_bytes():
    from rowwise_casts_timing import least_bytes, moved_bytes

    assert least_bytes(10, 100, "row") == 2000 + 1000 + 40
    assert least_bytes(10, 100, "column") == 2000 + 1000 + 400
    assert least_bytes(10, 100, "both") == 2000 + 2000 + 440
    assert moved_bytes(10, 100, "both") == 4000 + 2000 + 440


def test_operands_exceed_the_cache_together(monkeypatch):
    import rowwise_casts_timing as timing

    monkeypatch.setattr(timing, "ROTATED_BYTES", 10_000)
    assert [len(timing.random_operands(m, 16, torch.device("cpu"))) for m in (16, 1000)] == [20, 3]


def test_a_setting_that_torch_does_not_have_is_named():
    from rowwise_casts_torchao import already_default, unknown_to_torch

    assert unknown_to_torch({"triton.tile_reductions": True, "triton.nonsense": 1}) == ("triton.nonsense",)
    assert unknown_to_torch({"triton.tile_reductions": True}) == ()
    assert already_default({"triton.tile_reductions": False})
    assert not already_default({"triton.tile_reductions": True})


def timing(form: str, method: str, us: float, **fields):
    from rowwise_casts_output import Timing

    return Timing(
        m=8,
        k=16,
        form=form,
        method=method,
        times_us=(us,),
        least_bytes=400,
        moved_bytes=600,
        **{"launch": "", **fields},
    )


def test_tables_show_the_fastest_launch_and_what_is_wrong(tmp_path):
    from rowwise_casts_output import SettingResult, report

    results = [
        timing("copy", "copy_", 1.0),
        timing("column", "strip", 4.0, launch="slow"),
        timing("column", "strip", 2.0, launch="fast"),
        timing("column", "Inductor", 8.0, equal=False),
        SettingResult(m=8, k=16, form="column", setting="a", times_us=(4.0,), least_bytes=400, kernels=2, equal=True),
        SettingResult(m=8, k=16, form="column", setting="b", problem="is the default"),
    ]
    text = report(results)
    assert "| 50%" in text
    assert "fast" in text
    assert "slow" not in text
    assert "Inductor (WRONG)" in text
    assert "is the default" in text


def test_equality_names_only_what_differs():
    from rowwise_casts_output import Equality, report

    same = Equality(case="zeros", powers_of_two=True, compared="strip", m=8, k=16, different_scales=0, different_data=0)
    wrong = Equality(case="NaNs", powers_of_two=True, compared="strip", m=8, k=16, different_scales=0, different_data=3)
    text = report([same, wrong])
    assert "Of 2 comparisons with torchao's casts, 1 are equal in all bits." in text
    assert "NaNs" in text
    assert "zeros" not in text


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    import msgspec
    from rowwise_casts_output import read_results

    result = timing("copy", "copy_", 1.0)
    file = tmp_path / "casts.jsonl"
    file.write_bytes(msgspec.json.encode(result) + b'\n{"type":"Tim')
    assert read_results(file) == [result]
    file.write_bytes(b"{}\n")
    with pytest.raises(msgspec.ValidationError):
        read_results(file)
