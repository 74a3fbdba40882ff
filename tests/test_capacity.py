"""How many workers a machine gets."""

from __future__ import annotations

import os

import pytest
from samples import CPU, GPU, PROTOCOL, replaced

from fp8gate.calibrate.device import capacity
from fp8gate.calibrate.device.capacity import default_workers, usable_cores, useful_workers

GIB = 2**30


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Makes this machine one of so many cores and so much memory, in a container with these limits."""

    def make(cores, memory_gib, **limits):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
        sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": memory_gib * GIB // 4096}
        monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
        monkeypatch.setattr(capacity, "CGROUP", tmp_path)
        for name, limit in limits.items():
            (tmp_path / name.replace("_", ".")).write_text(f"{limit}\n")

    return make


@pytest.mark.parametrize(
    ("cores", "memory_gib", "expected"),
    [(8, 64, 6), (8, 12, 2), (8, 11, 1), (3, 64, 1), (2, 64, 1), (1, 64, 1), (8, 2, 1), (18, 2000, 16), (96, 2000, 16)],
)
def test_there_are_as_many_workers_as_cores_and_memory_allow(machine, cores, memory_gib, expected):
    machine(cores, memory_gib)
    assert default_workers(CPU) == expected


@pytest.mark.parametrize(("device_gib", "expected"), [(139.8, 14), (80.0, 10), (24.0, 3), (6.0, 1)])
def test_a_small_gpu_gets_fewer(machine, device_gib, expected):
    machine(16, 128)
    assert default_workers(replaced(GPU, memory_gib=device_gib)) == expected
    assert default_workers(replaced(CPU, memory_gib=device_gib)) == 14  # workers take none of a CPU's own memory


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"cpu_max": "max 100000", "memory_max": "max"}, 14),
        ({"cpu_max": "800000 100000"}, 6),
        ({"cpu_max": "50000 100000"}, 1),
        ({"memory_max": 16 * GIB}, 3),
    ],
)
def test_a_container_has_what_it_was_given(machine, limits, expected):
    machine(16, 128, **limits)
    assert default_workers(CPU) == expected


@pytest.mark.parametrize(("cores_of_all", "expected"), [(16, 2), (64, 7)])
def test_ranks_of_one_machine_share_its_memory_and_its_cores_unless_each_has_its_own(
    machine, monkeypatch, cores_of_all, expected
):
    """4 of 16 cores a rank leave 2 workers; 16 cores of its own leave 14, but 32 GiB hold 7."""
    machine(16, 128)
    monkeypatch.setattr(os, "cpu_count", lambda: cores_of_all)
    assert default_workers(CPU, sweeps=4) == expected


def test_workers_are_of_use_only_where_something_is_compiled(machine):
    machine(8, 64)
    compiled = replaced(PROTOCOL, compile=True)
    assert useful_workers(GPU, {"tensorwise": PROTOCOL, "rowwise": PROTOCOL}) == 0
    assert useful_workers(GPU, {"tensorwise": PROTOCOL, "rowwise": compiled}) == 6


def test_cores_that_this_process_may_not_use_do_not_count():
    before = os.sched_getaffinity(0)
    assert usable_cores() == len(before)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_where_a_process_may_use_all_cores_all_count(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(capacity, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert usable_cores() == 12
