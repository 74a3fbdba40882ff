"""What is seen of a GPU from outside, and that two sweeps never share a device."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pynvml
import pytest
import torch
from samples import python

from fp8gate.calibrate.device.cpu import CpuWatch
from fp8gate.calibrate.device.cuda.watch import GpuWatch
from fp8gate.calibrate.device.lock import DeviceBusyError, DeviceLock
from fp8gate.calibrate.device.registry import kind_of
from fp8gate.calibrate.device.watch import other_processes
from fp8gate.filter.contract.errors import InputError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HOLD = """
import time
import torch
from fp8gate.calibrate.device.lock import DeviceLock

with DeviceLock(torch.device("cpu")):
    print("held", flush=True)
    time.sleep(60)
"""
TAKE_AS_NOBODY = """
import os
import torch
from fp8gate.calibrate.device.lock import DeviceLock

os.setuid(65534)
with DeviceLock(torch.device("cpu")) as lock:
    print(lock.path)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where this test's locks are."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def uuid_of_gpu(monkeypatch):
    """Gives the GPU that torch sees this UUID."""

    def set_uuid(uuid):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))

    return set_uuid


class FakeNvml(ModuleType):
    """As much of pynvml as the watch asks: one GPU, whose state is set here."""

    def __init__(self, uuid):
        super().__init__("pynvml")
        names = [name for name in dir(pynvml) if name.startswith(("nvmlClocksEventReason", "NVMLError"))]
        self.__dict__.update({name: getattr(pynvml, name) for name in (*names, "NVML_CLOCK_SM")})
        self.uuid = uuid
        self.initialized = False
        self.reasons = pynvml.nvmlClocksEventReasonNone
        self.clocks_mhz = {pynvml.NVML_CLOCK_SM: 1980, pynvml.NVML_CLOCK_MEM: 3201}
        self.running = {}

    def nvmlInit(self):
        self.initialized = True

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert self.initialized
        if uuid != self.uuid:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return "handle"

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        assert handle == "handle"
        return self.reasons

    def nvmlDeviceGetClockInfo(self, handle, kind):
        assert handle == "handle"
        return self.clocks_mhz[kind]

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        assert handle == "handle"
        return [SimpleNamespace(pid=pid) for pid in self.running]

    def nvmlSystemGetProcessName(self, pid):
        if self.running[pid] is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return self.running[pid]


@pytest.fixture
def nvml(monkeypatch, uuid_of_gpu):
    uuid_of_gpu("1234-abcd")
    nvml = FakeNvml("GPU-1234-abcd")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def test_a_gpu_that_runs_as_it_should_has_no_slowdown(nvml):
    watch = kind_of(CUDA).make_watch(CUDA)
    assert isinstance(watch, GpuWatch)
    assert watch.slowdown() is None


@pytest.mark.parametrize("harmless", ["SwPowerCap", "GpuIdle", "ApplicationsClocksSetting", "SyncBoost"])
def test_the_power_limit_is_no_slowdown(nvml, harmless):
    nvml.reasons = getattr(pynvml, f"nvmlClocksEventReason{harmless}")
    assert GpuWatch(CUDA).slowdown() is None


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        ("HwSlowdown", "hardware slowdown"),
        ("HwThermalSlowdown", "hardware thermal slowdown"),
        ("HwPowerBrakeSlowdown", "power brake"),
        ("SwThermalSlowdown", "thermal slowdown"),
    ],
)
def test_a_slowdown_is_named(nvml, reason, name):
    watch = GpuWatch(CUDA)
    nvml.reasons = getattr(pynvml, f"nvmlClocksEventReason{reason}") | pynvml.nvmlClocksEventReasonSwPowerCap
    assert watch.slowdown() == name
    nvml.reasons = pynvml.nvmlClocksEventReasonSwPowerCap
    assert watch.slowdown() is None


def test_the_power_limit_is_told(nvml):
    watch = GpuWatch(CUDA)
    nvml.reasons = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonSyncBoost
    assert watch.is_power_limited()
    nvml.reasons = pynvml.nvmlClocksEventReasonHwSlowdown
    assert not watch.is_power_limited()
    assert not CpuWatch().is_power_limited()


def test_all_slowdowns_are_named(nvml):
    nvml.reasons = pynvml.nvmlClocksEventReasonHwSlowdown | pynvml.nvmlClocksEventReasonHwThermalSlowdown
    assert GpuWatch(CUDA).slowdown() == "hardware slowdown, hardware thermal slowdown"


def test_the_clock_is_the_multiprocessors(nvml):
    assert GpuWatch(CUDA).sm_clock_mhz() == 1980


def test_the_watch_is_on_the_gpu_that_torch_uses(nvml):
    nvml.uuid = "GPU-of-another"
    with pytest.raises(ValueError, match="Not Found"):
        GpuWatch(CUDA)


def test_processes_on_the_gpu_have_names_as_far_as_the_driver_tells(nvml):
    watch = GpuWatch(CUDA)
    assert watch.processes() == {}
    nvml.running = {12: "python3", 34: None}
    assert watch.processes() == {12: "python3", 34: "unknown"}


def test_nothing_is_known_of_a_cpu():
    watch = kind_of(CPU).make_watch(CPU)
    assert isinstance(watch, CpuWatch)
    assert (watch.slowdown(), watch.sm_clock_mhz(), watch.processes()) == (None, None, {})


@pytest.mark.parametrize(
    ("processes", "own", "expected"),
    [
        pytest.param({}, [], [], id="nothing there"),
        pytest.param({}, [1, 2], [], id="we are not there yet"),
        pytest.param({1: "python3", 2: "python3"}, [1, 2, 3], [], id="only ours"),
        pytest.param({9: "trainer", 1: "python3", 8: "unknown"}, [1, 2], ["8 (unknown)", "9 (trainer)"], id="others"),
        pytest.param({9: "trainer"}, [], ["9 (trainer)"], id="before we have started"),
        pytest.param({71: "unknown", 72: "unknown"}, [1, 2], [], id="as many as we are, numbered otherwise"),
        pytest.param({71: "unknown"}, [1, 2], [], id="fewer than we are, numbered otherwise"),
        pytest.param(
            {71: "unknown", 72: "unknown", 73: "unknown"},
            [1, 2],
            ["1 that cannot be told from this sweep's own"],
            id="more than we are, numbered otherwise",
        ),
    ],
)
def test_foreign_processes_are_those_that_are_not_ours(processes, own, expected):
    assert other_processes(processes, own) == expected
    assert other_processes(processes, iter(own)) == expected


def test_the_lock_names_its_holder(temporary):
    lock = DeviceLock(CPU)
    assert lock.path.parent == temporary
    lock.path.write_text("a longer text than a process number")
    with lock:
        assert lock.path.read_text() == str(os.getpid())


def test_the_lock_is_free_again_after_use():
    for _ in range(2):
        with DeviceLock(CPU), pytest.raises(DeviceBusyError, match=f"process {os.getpid()} "), DeviceLock(CPU):
            pass


def test_the_lock_is_free_again_after_an_error():
    with pytest.raises(KeyError), DeviceLock(CPU):
        raise KeyError
    with DeviceLock(CPU):
        pass


def test_each_device_has_its_own_lock(uuid_of_gpu):
    uuid_of_gpu("1234")
    with DeviceLock(CPU), DeviceLock(CUDA):
        with pytest.raises(DeviceBusyError), DeviceLock(CUDA):
            pass
        uuid_of_gpu("5678")
        with DeviceLock(CUDA):
            pass


def test_a_process_holds_the_lock_until_it_is_killed(temporary):
    holder = python("-c", HOLD, TMPDIR=str(temporary))
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DeviceBusyError) as caught, DeviceLock(CPU):
            pass
        path = temporary / "fp8gate-cpu.lock"
        assert str(caught.value) == f"another sweep is measuring on this device: process {holder.pid} ({path})"
        assert path.read_text() == str(holder.pid)
    finally:
        holder.kill()
        holder.communicate()
    with DeviceLock(CPU) as lock:
        assert lock.path == path
        assert path.read_text() == str(os.getpid())


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_can_take_a_lock_that_is_free(monkeypatch):
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # only its owner may enter pytest's
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    folder.chmod(0o1777)  # as /tmp is
    try:
        with DeviceLock(CPU) as ours:
            pass
        taken = python("-c", TAKE_AS_NOBODY, TMPDIR=str(folder))
        output, errors = taken.communicate()
        assert (taken.returncode, output) == (0, f"{ours.path}\n"), errors
    finally:
        shutil.rmtree(folder)


def test_a_lock_that_leads_elsewhere_is_refused_and_not_written_to(temporary):
    elsewhere = temporary / "elsewhere"
    elsewhere.write_text("mine")
    path = DeviceLock(CPU).path
    path.symlink_to(elsewhere)
    with pytest.raises(OSError, match="symbolic"), DeviceLock(CPU):
        pass
    path.unlink()
    os.link(elsewhere, path)
    with pytest.raises(InputError, match="expected a file of its own"), DeviceLock(CPU):
        pass
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="expected a file of its own"), DeviceLock(CPU):
        pass
    assert elsewhere.read_text() == "mine"


def test_only_a_processors_timings_are_disturbed_by_waiting_for_one(nvml):
    assert GpuWatch(CUDA).waited_s() is None
    waited_s = CpuWatch().waited_s()
    assert waited_s is None or waited_s >= 0.0  # None where the system does not tell
