"""How much of a copy's bandwidth do the casts of the rowwise recipe reach: torchao's by Inductor, and a kernel's?

Parts, in this order:
- equality: are the kernels' scales and float8 data those of torchao's casts, bit for bit? Inductor's, too, once.
- forms: at each size a bf16 copy, Inductor's casts to the row form, the column form and both, and the kernels at every
  launch in their lists (benchmarks/rowwise_casts_kernels.py says what the forms are).
- settings: Inductor's casts under each setting in benchmarks/rowwise_casts_torchao.py, one at a time, at three sizes.

Bandwidth is bytes / time with the fewest bytes that a cast can move: 2 M K for the operand, read once, and for each
form M K bytes of float8 and 4 M (row form) or 4 K (column form) of scales. A copy moves 4 M K. A cast has to know the
amaxes before it casts, so one that finds nothing in a cache reads the operand twice: the tables show this share, too.

Times are medians of 25 samples, from CUDA events around a graph that rotates operands larger than the L2 cache.
Each result is a line of --out as soon as it is known; rowwise_casts_output.py makes the tables again from it.

Run it: python benchmarks/rowwise_casts.py --out casts.jsonl --stop-after 95
On several GPUs, each with a part or a size of its own: CUDA_VISIBLE_DEVICES, --parts, --sizes, --setting-sizes.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch
from rowwise_casts_equality import all_equal, compare_forms, every_magnitude, special_operands, unequal
from rowwise_casts_launches import KernelSweep
from rowwise_casts_output import Equality, Result, Run, SettingResult, Timing, report
from rowwise_casts_timing import COPY_BYTES, least_bytes, moved_bytes, random_operands, sample_us
from rowwise_casts_torchao import (
    COMPILER_ERRORS,
    SETTINGS,
    TOGETHER,
    already_default,
    compile_cast,
    describe_setting,
    torchao_forms,
    unknown_to_torch,
)
from torch._inductor.utils import fresh_cache

SIZES = (
    (8192, 8192),
    (4096, 4096),
    (8192, 1024),
    (8192, 28672),
    (8192, 4096),
    (8192, 14336),
    (16384, 8192),
    (4096, 14336),
)
"""Operands of Llama 8B and 70B at 4096 to 16384 tokens. The most telling first, as a run may be stopped."""
SETTING_SIZES = ((8192, 8192), (4096, 4096), (8192, 28672))
EQUALITY_SIZE = (1040, 1552)  # multiples of 16, as products need, but of no block
POWERS_OF_TWO = True  # as torchao's rowwise recipe has it
PARTS = ("equality", "forms", "settings")


class OutOfTime(Exception):
    """--stop-after is over."""


@dataclass(kw_only=True, slots=True)
class Recorder:
    """Writes each result at once, and stops the run when its time is over."""

    out: Path
    deadline: float
    results: list[Result]

    def add(self, result: Result) -> None:
        self.results.append(result)
        with open(self.out, "ab") as file:
            file.write(msgspec.json.encode(result) + b"\n")
        if time.monotonic() > self.deadline:
            raise OutOfTime


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a file of JSON lines; what is in it stays")
    parser.add_argument("--stop-after", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=SIZES, metavar="MxK")
    parser.add_argument("--setting-sizes", nargs="+", type=parse_size, default=SETTING_SIZES, metavar="MxK")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA GPU: tests/test_rowwise_casts.py runs the kernels on a CPU")
    recorder = Recorder(out=arguments.out, deadline=start + arguments.stop_after, results=[])
    device = torch.device("cuda")
    runs: dict[str, Callable[[], Iterator[Result]]] = {
        "equality": partial(measure_equality, device),
        "forms": partial(measure_forms, arguments.sizes, device),
        "settings": partial(measure_settings, arguments.setting_sizes, device),
    }
    try:
        recorder.add(describe(device))
        for part in arguments.parts:
            for result in runs[part]():
                recorder.add(result)
            print(f"{part} done after {time.monotonic() - start:.0f} s", file=sys.stderr)
    except OutOfTime:
        print(f"stopped after {time.monotonic() - start:.0f} s: the tables are incomplete", file=sys.stderr)
    finally:  # after Ctrl-C too, show what has been measured
        print(report(recorder.results))


def parse_size(text: str) -> tuple[int, int]:
    m, k = text.split("x")
    return int(m), int(k)


def describe(device: torch.device) -> Run:
    return Run(
        device=torch.cuda.get_device_name(device),
        torch=str(torch.__version__),
        torchao=version("torchao"),
        triton=version("triton"),
        command=shlex.join(sys.argv),
    )


def measure_equality(device: torch.device) -> Iterator[Equality]:
    cases = [*special_operands(*EQUALITY_SIZE, device), ("every magnitude", every_magnitude(device))]
    for powers_of_two in (True, False):
        for case, x in cases:
            for c in compare_forms(case, x, powers_of_two=powers_of_two):
                yield equality(case, x, powers_of_two, f"{c.method}, {c.form}", c.different_scales, c.different_data)
    m, k = EQUALITY_SIZE
    inductor = compile_cast("both", torch.empty(m, k, dtype=torch.bfloat16, device=device)).cast
    for case, x in special_operands(m, k, device):
        for form, counts in zip(("row", "column"), unequal(inductor(x), torchao(x, "both")), strict=True):
            yield equality(case, x, POWERS_OF_TWO, f"Inductor, {form}", *counts)


def equality(case: str, x: torch.Tensor, powers_of_two: bool, compared: str, scales: int, data: int) -> Equality:
    m, k = x.shape
    return Equality(
        case=case,
        powers_of_two=powers_of_two,
        compared=compared,
        m=m,
        k=k,
        different_scales=scales,
        different_data=data,
    )


def torchao(x: torch.Tensor, form: str) -> tuple[torch.Tensor, ...]:
    return torchao_forms(form, powers_of_two=POWERS_OF_TWO)(x)


def measure_forms(sizes: Iterable[tuple[int, int]], device: torch.device) -> Iterator[Timing]:
    for m, k in sizes:
        operands = random_operands(m, k, device)
        yield measure_copy(m, k, operands)
        yield from KernelSweep(operands=operands, powers_of_two=POWERS_OF_TWO).timings()
        for form in ("column", "row", "both"):
            compiled = compile_cast(form, operands[0], powers_of_two=POWERS_OF_TWO)
            yield Timing(
                m=m,
                k=k,
                form=form,
                method="Inductor",
                launch="",
                times_us=sample_us(compiled.cast, [(x,) for x in operands]),
                least_bytes=least_bytes(m, k, form),
                moved_bytes=moved_bytes(m, k, form),
                equal=all_equal(compiled.cast(operands[0]), torchao(operands[0], form)),
                compiling_s=compiled.compiling_s,
            )


def measure_copy(m: int, k: int, operands: list[torch.Tensor]) -> Timing:
    def copy(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x).copy_(x)

    copy(operands[0])
    copied = COPY_BYTES * m * k
    times_us = sample_us(copy, [(x,) for x in operands])
    return Timing(
        m=m, k=k, form="copy", method="copy_", launch="", times_us=times_us, least_bytes=copied, moved_bytes=copied
    )


def measure_settings(sizes: Iterable[tuple[int, int]], device: torch.device) -> Iterator[SettingResult | Timing]:
    """The column form at every size, then both forms: what is slow today comes first. A copy of each, to compare."""
    for form in ("column", "both"):
        for m, k in sizes:
            operands = random_operands(m, k, device)
            yield measure_copy(m, k, operands)
            default: tuple[str, ...] = ()
            for setting in ({}, *SETTINGS, TOGETHER):
                result, kernels = measure_setting(form, m, k, operands, setting, default)
                default = default or kernels
                yield result


def measure_setting(
    form: str,
    m: int,
    k: int,
    operands: list[torch.Tensor],
    setting: Mapping[str, object],
    default: tuple[str, ...],
) -> tuple[SettingResult, tuple[str, ...]]:
    """The result, and the kernels. A setting that is unknown, already on, or that Inductor fails with is not timed."""
    name = describe_setting(setting)
    unknown = unknown_to_torch(setting)
    if unknown or (setting and already_default(setting)):
        problem = f"this torch has no {', '.join(unknown)}" if unknown else "is the default"
        return SettingResult(m=m, k=k, form=form, setting=name, problem=problem), ()
    try:
        with fresh_cache():  # so that it really compiles
            compiled = compile_cast(form, operands[0], setting, powers_of_two=POWERS_OF_TWO)
        found = compiled.cast(operands[0])
    except COMPILER_ERRORS as error:
        problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80] if str(error).strip() else ''}"
        return SettingResult(m=m, k=k, form=form, setting=name, problem=problem), ()
    result = SettingResult(
        m=m,
        k=k,
        form=form,
        setting=name,
        times_us=sample_us(compiled.cast, [(x,) for x in operands]),
        least_bytes=least_bytes(m, k, form),
        compiling_s=compiled.compiling_s,
        kernels=len(compiled.kernels),
        same_kernels=bool(default) and compiled.kernels == default,
        equal=all_equal(found, torchao(operands[0], form)),
    )
    return result, compiled.kernels


if __name__ == "__main__":
    main()
