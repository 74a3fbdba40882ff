"""What the profiler records, taken apart: kinds by name, passes between flushes, sums over passes."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import Interval
from torch.profiler import ProfilerActivity

from fp8gate.calibrate.breakdown import profiler
from fp8gate.calibrate.breakdown.profiler import (
    Event,
    Kernel,
    ProfileError,
    flush_names,
    kernel_kind,
    passes,
    record,
    summed,
)
from fp8gate.calibrate.device.cpu import CpuTimer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name",
    [
        "nvjet_hsh_256x128_64x4_1x2_h_bz_coopB_TNT",
        "nvjet_qqtst_128x256_128x6_2x1_2cta_v_bz_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1",
        "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x4_tn",
        "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::GemmUniversal>>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, float>",
        "triton_tem_fused__scaled_mm_0",
        "triton_mm",
        "aten::mm",
        "aten::addmm",
        "aten::_scaled_mm",
    ],
)
def test_products(name):
    assert kernel_kind(name) == "product"


@pytest.mark.parametrize(
    "name",
    [
        "triton_red_fused_abs_amax_0",
        "triton_poi_fused__scaled_mm__to_copy_clamp_mul_t_3",
        "triton_per_fused_mm_1",
        "Memset (Device)",
        "Memcpy DtoD (Device -> Device)",
        "void at::native::elementwise_kernel<128, 4>",
        "aten::linear",
        "aten::matmul",
        "aten::copy_",
        "MmBackward0",
        "a kernel that nobody knows",
    ],
)
def test_all_else_is_casts(name):
    assert kernel_kind(name) == "cast"


def events(text):
    """ "flush a a": one event a word, of 1, 2, 3, ... us."""
    return [Event(name, float(i + 1)) for i, name in enumerate(text.split())]


def names(found):
    return [" ".join(event.name for event in one) for one in found]


def test_a_pass_is_what_lies_between_flushes():
    assert names(passes(events("x flush a b flush flush c flush"), ["flush"])) == ["a b", "c"]


def test_a_flush_of_several_events_is_told_from_its_parts():
    assert names(passes(events("set read a set b set read set c"), ["set", "read"])) == ["a set b", "set c"]


def test_without_a_flush_there_is_no_pass():
    assert passes(events("a b"), ["flush"]) == []


def test_times_are_means_over_passes_of_all_calls_of_a_name():
    first, second = events("aten::mm copy copy"), events("copy aten::mm copy")
    assert summed([first, second]) == (
        Kernel(name="aten::mm", kind="product", calls=1, time_us=(1 + 2) / 2),
        Kernel(name="copy", kind="cast", calls=2, time_us=(2 + 3 + 1 + 3) / 2),
    )


@pytest.mark.parametrize("other", ["a", "a b b", "a c", ""])
def test_passes_that_differ_are_an_error(other):
    with pytest.raises(ProfileError, match="all run the same"):
        summed([events("a b"), events(other)])


def test_a_pass_of_nothing_is_an_error():
    with pytest.raises(ProfileError):
        summed([[], []])


def test_only_what_runs_after_the_start_is_recorded_and_nested_ops_count_once():
    x = torch.ones(64, 64)
    found = record(CPU, run=lambda: torch.matmul(x, x), before=lambda: torch.add(x, x))
    assert [event.name for event in found][:2] == ["aten::matmul", "aten::mm"]
    matmul, mm = found[0].time_us, found[1].time_us
    assert 0 < matmul < mm


def test_of_a_gpu_only_what_it_ran_itself_is_recorded_in_the_order_it_began(monkeypatch):
    def event(name, start_us, end_us, device=DeviceType.CUDA, mark=False):
        times = Interval(start_us, end_us)
        return SimpleNamespace(name=name, time_range=times, device_type=device, is_user_annotation=mark)

    ran = [
        event("triton_poi_fused_0", 7.5, 9.0),
        event("cudaGraphLaunch", 0.0, 5.0, DeviceType.CPU),
        event("ProfilerStep#1", 0.0, 20.0, mark=True),
        event("Memset (Device)", 4.0, 4.5),
    ]
    fake = MagicMock()
    fake.return_value.__enter__.return_value.events.return_value = ran
    monkeypatch.setattr(profiler, "profile", fake)
    monkeypatch.setenv("TEARDOWN_CUPTI", "0")
    found = record(torch.device("cuda"), lambda: None, lambda: None)
    assert found == [Event("Memset (Device)", 0.5), Event("triton_poi_fused_0", 1.5)]
    assert fake.call_args.kwargs["activities"] == [ProfilerActivity.CUDA]


def test_the_flush_of_a_cpu_is_known_by_its_ops():
    timer = CpuTimer(2**16)
    flush = flush_names(timer, CPU)
    assert flush[0] == "aten::sum"

    def run():
        for _ in range(2):
            timer.flush()
            torch.ones(8, 8) @ torch.ones(8, 8)

    halves = passes(record(CPU, run, before=run), flush)
    assert [half[-1].name for half in halves] == [halves[0][-1].name] * 2
    assert [sum(event.name == "aten::mm" for event in half) for half in halves] == [1, 1]


@pytest.mark.parametrize(
    ("recorded", "one"),
    [
        ("set read set read set read set read", "set read"),
        ("read set read set read set read", "set read"),  # the first event came before the start
        ("read read read read", "read"),
    ],
)
def test_a_flush_is_the_shortest_that_repeats_to_the_end(monkeypatch, recorded, one):
    monkeypatch.setattr(profiler, "record", lambda *_: events(recorded))
    assert flush_names(None, CPU) == one.split()


@pytest.mark.parametrize("recorded", ["", "set read read set", "read"])
def test_flushes_that_do_not_repeat_are_an_error(monkeypatch, recorded):
    monkeypatch.setattr(profiler, "record", lambda *_: events(recorded))
    with pytest.raises(ProfileError, match="4 flushes"):
        flush_names(None, CPU)
