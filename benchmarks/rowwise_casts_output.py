"""What benchmarks/rowwise_casts.py writes, a JSON line for each result, and the tables made of it, as Markdown.

Run it: python benchmarks/rowwise_casts_output.py casts.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

import msgspec
from tabulate import tabulate

FORM_HEADERS = ("M x K", "form", "cast", "us", "GB/s", "of a copy", "of a copy, counting both reads", "launch")
SETTING_HEADERS = ("M x K", "form", "setting", "us", "of a copy", "compiled in s", "kernels", "as torchao")
EQUALITY_HEADERS = ("operand", "M x K", "powers of two", "compared", "scales that differ", "data that differ")


class Run(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first line: where and with what."""

    device: str
    torch: str
    torchao: str
    triton: str
    command: str


class Timing(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One cast, or one kernel of it, of an operand (m, k).

    form: "copy", "row", "column" or "both". least_bytes: the operand read once, each form written once.
    moved_bytes: the operand read twice. equal: are all its bits those of torchao's cast of the same operand?
    """

    m: int
    k: int
    form: str
    method: str
    launch: str
    times_us: tuple[float, ...]
    least_bytes: int
    moved_bytes: int
    part_of_cast: bool = False
    equal: bool | None = None
    compiling_s: float | None = None

    @property
    def us(self) -> float:
        return median(self.times_us)


class SettingResult(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An Inductor cast under a setting; problem says why it was not timed.

    kernels: how many Triton kernels. same_kernels: are they those of the default settings, launches apart?
    """

    m: int
    k: int
    form: str
    setting: str
    times_us: tuple[float, ...] = ()
    least_bytes: int = 0
    compiling_s: float = 0.0
    kernels: int = 0
    same_kernels: bool = False
    equal: bool = False
    problem: str = ""


class Equality(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    case: str
    powers_of_two: bool
    compared: str
    m: int
    k: int
    different_scales: int
    different_data: int


Result = Run | Timing | SettingResult | Equality


def read_results(path: Path) -> list[Result]:
    """msgspec.DecodeError for a line that is none of them, but for a last line that was cut off."""
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    return [msgspec.json.decode(line, type=Result) for line in whole]


def report(results: Iterable[Result]) -> str:
    """The tables of what there is."""
    results = list(results)
    parts = [describe_run(r) for r in results if isinstance(r, Run)]
    parts += [equality_table([r for r in results if isinstance(r, Equality)])]
    timings = [r for r in results if isinstance(r, Timing)]
    parts += [form_table(timings), setting_table([r for r in results if isinstance(r, SettingResult)], timings)]
    return "\n\n".join(part for part in parts if part)


def describe_run(run: Run) -> str:
    return f"{run.device}, torch {run.torch}, torchao {run.torchao}, triton {run.triton}: `{run.command}`"


def form_table(timings: list[Timing]) -> str:
    """The fastest launch of each cast, and what share of a copy's bandwidth it reaches."""
    copies = {(t.m, t.k): t for t in timings if t.form == "copy"}
    fastest: dict[tuple[int, int, str, str], Timing] = {}
    for timing in timings:
        key = (timing.m, timing.k, timing.form, timing.method)
        if key not in fastest or timing.us < fastest[key].us:
            fastest[key] = timing
    rows = []
    for timing in fastest.values():
        copy = copies[timing.m, timing.k]
        copy_rate = copy.least_bytes / copy.us
        rows.append(
            (
                f"{timing.m} x {timing.k}",
                timing.form,
                timing.method + {None: "", True: "", False: " (WRONG)"}[timing.equal],
                f"{timing.us:.1f}",
                f"{timing.least_bytes / timing.us / 1e3:.0f}",
                "" if timing.part_of_cast else f"{timing.least_bytes / timing.us / copy_rate:.0%}",
                f"{timing.moved_bytes / timing.us / copy_rate:.0%}",
                timing.launch,
            )
        )
    return table("Bandwidth", FORM_HEADERS, rows)


def setting_table(results: list[SettingResult], timings: list[Timing]) -> str:
    copy_rate = {(t.m, t.k): t.least_bytes / t.us for t in timings if t.form == "copy"}
    rows: list[tuple[str, ...]] = []
    for result in results:
        shape = f"{result.m} x {result.k}"
        if result.problem:
            rows.append((shape, result.form, result.setting, result.problem, "", "", "", ""))
            continue
        us = median(result.times_us)
        rate = copy_rate.get((result.m, result.k))
        rows.append(
            (
                shape,
                result.form,
                result.setting,
                f"{us:.1f}",
                f"{result.least_bytes / us / rate:.0%}" if rate else "",
                f"{result.compiling_s:.1f}",
                f"{result.kernels}{', as by default' if result.same_kernels else ''}",
                "equal" if result.equal else "DIFFERENT",
            )
        )
    return table("Inductor's settings", SETTING_HEADERS, rows)


def equality_table(results: list[Equality]) -> str:
    """Only what differs, below how many comparisons there were."""
    if not results:
        return ""
    different = [r for r in results if r.different_scales or r.different_data]
    line = f"Of {len(results)} comparisons with torchao's casts, {len(results) - len(different)} are equal in all bits."
    rows = [
        (
            r.case,
            f"{r.m} x {r.k}",
            "on" if r.powers_of_two else "off",
            r.compared,
            str(r.different_scales),
            str(r.different_data),
        )
        for r in different
    ]
    return "\n\n".join(part for part in (line, table("Differences", EQUALITY_HEADERS, rows)) if part)


def table(title: str, headers: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    return f"{title}\n\n" + tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    for path in parser.parse_args().results:  # each may come from another board: shares of a copy are within one
        print(report(read_results(path)), end="\n\n")


if __name__ == "__main__":
    main()
