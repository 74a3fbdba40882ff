"""Inductor's choice of launch configurations: made by this package's timer, and by what a kernel takes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.runtime import triton_heuristics

from fp8gate.calibrate.device.cuda.launch_tuning import tune_by
from fp8gate.calibrate.device.cuda.timer import HEAD_START, CapturedArm, CudaTimer
from fp8gate.calibrate.device.timer import TUNING_RUNS, Sample


@pytest.fixture
def autotuner(monkeypatch):
    """As much of Inductor's autotuner as its timing of a configuration needs; restored afterwards."""
    monkeypatch.setattr(triton_heuristics, "benchmarker", triton_heuristics.benchmarker)
    device = SimpleNamespace(current_device=lambda: 0, get_raw_stream=lambda _: 7)
    return SimpleNamespace(
        custom_kernel=True,
        inductor_meta={},
        device_props=SimpleNamespace(type="cuda"),
        get_device_interface=lambda: device,
        copy_args_to_cpu_if_needed=lambda *_, **__: {},
        maybe_clone_args=lambda _, *args, **kwargs: (args, kwargs),
        reset_to_zero_args=lambda *_, **__: None,
        restore_args_from_cpu=lambda _: None,
    )


def test_inductor_times_a_configuration_by_the_timer(autotuner):
    launches = []

    def least_us(launch):
        launch()
        return 4500.0

    tune_by(SimpleNamespace(least_us=least_us))
    milliseconds = triton_heuristics.CachingAutotuner.bench(
        autotuner, lambda *args, stream: launches.append((args, stream)), "x", "out"
    )
    assert milliseconds == 4.5
    assert launches == [(("x", "out"), 7)]


class FakeGpu:
    """Time that passes in what is enqueued, events that note it, and the order of everything.

    times_us: of the launches, one after the other.
    """

    def __init__(self, monkeypatch, times_us):
        self.times_us, self.now_us, self.log = iter(times_us), 0.0, []
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=2**16))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing, external: FakeEvent(self))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.log.append("wait"))

    def enqueue(self, name, time_us):
        self.log.append(name)
        self.now_us += time_us

    def least_us(self):
        timer = LoggedTimer(self)
        return timer.least_us(lambda: self.enqueue("launch", next(self.times_us)))


class FakeEvent:
    """Notes when the GPU comes to it."""

    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at_us = self.gpu.now_us

    def elapsed_time(self, end):
        """Milliseconds, as CUDA tells."""
        return (end.at_us - self.at_us) / 1e3


class LoggedTimer(CudaTimer):
    """A timer of this GPU, which sees its flushes; its memory is the CPU's."""

    def __init__(self, gpu):
        super().__init__(torch.device("cpu"))
        self.gpu = gpu

    def flush(self):
        self.gpu.enqueue("flush", 60.0)


class FakeGraph:
    """Rounds of one arm as a graph: the GPU runs it at its own pace, whenever the host launches it."""

    def __init__(self, gpu, name, rounds):
        self.gpu, self.name = gpu, name
        self.events = [tuple(FakeEvent(gpu) for _ in range(4)) for _ in range(rounds)]

    def replay(self):
        self.gpu.now_us += 500.0  # a loaded host
        self.gpu.log.append(self.name)
        for one in self.events:
            for event, time_us in zip(one, (60.0, 10.0, 60.0, 20.0), strict=True):  # before the event
                self.gpu.now_us += time_us
                event.record()


def captured(gpu, name, rounds=4):
    graph = FakeGraph(gpu, name, rounds)
    return CapturedArm(graph, graph.events, None)


@pytest.mark.parametrize(("asked", "replays"), [(1, 1), (4, 1), (5, 2)])
def test_a_replay_gives_all_its_rounds_and_nothing_of_the_host(monkeypatch, asked, replays):
    gpu = FakeGpu(monkeypatch, [])
    rounds = LoggedTimer(gpu).rounds([captured(gpu, "a")], [[0]] * asked)
    assert rounds == [[Sample(10.0, 20.0)]] * (4 * replays)
    assert gpu.log == ["a", "wait"] * replays


def test_arms_take_turns_replay_by_replay(monkeypatch):
    gpu = FakeGpu(monkeypatch, [])
    orders = [[0, 1], [1, 0], [0, 1], [1, 0]]
    rounds = LoggedTimer(gpu).rounds([captured(gpu, "a", 4), captured(gpu, "b", 1)], orders)
    assert rounds == [[Sample(10.0, 20.0)] * 2] * 4
    assert gpu.log == ["a", "b", "wait", "b", "a", "wait", "a", "b", "wait", "b", "a", "wait"]


def test_the_shortest_of_all_runs_counts(monkeypatch):
    gpu = FakeGpu(monkeypatch, [400.0, 25.0, 9.0, 8.0, 25.0, 25.0, 7.5, *[26.0] * 6])
    assert gpu.least_us() == pytest.approx(7.5)
    assert gpu.log.count("launch") == 1 + sum(TUNING_RUNS)


def test_the_first_run_does_not_count(monkeypatch):
    gpu = FakeGpu(monkeypatch, [1.0, *[8.0] * sum(TUNING_RUNS)])
    assert gpu.least_us() == pytest.approx(8.0)


def test_of_long_runs_three_are_enough(monkeypatch):
    gpu = FakeGpu(monkeypatch, [1300.0, 1210.0, 1205.0, 1206.0, math.nan])
    assert gpu.least_us() == pytest.approx(1205.0)
    assert gpu.log.count("launch") == 1 + TUNING_RUNS[0]


def test_every_run_is_cold_and_the_host_is_ahead_of_the_first(monkeypatch):
    gpu = FakeGpu(monkeypatch, [500.0] * 4)
    gpu.least_us()
    assert gpu.log == ["launch", *["flush"] * HEAD_START, *["flush", "launch"] * 3, "wait"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_run_on_a_gpu_takes_as_long_as_what_it_does():
    timer = CudaTimer(torch.device("cuda"))
    small, large = (torch.zeros(size * 2**20, device="cuda") for size in (16, 256))
    small_us, large_us = (timer.least_us(lambda x=x: x.add_(1)) for x in (small, large))
    assert 8 * small_us < large_us < 32 * small_us
