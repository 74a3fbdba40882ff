"""Compiling ahead: what a worker put into Inductor's cache is what the timing process asks for.

One variant is compiled, by a worker of a process of its own, as in a sweep; another process then loads it.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from samples import PROTOCOL, python, replaced

import fp8gate.calibrate.linears  # noqa: F401  (says how memory formats are pickled)
from fp8gate.calibrate import compile_ahead
from fp8gate.calibrate.compile_ahead import CompileAhead
from fp8gate.filter.shapes import LinearShape

SHAPE = LinearShape(64, 64, 64)

COMPILE_AHEAD = """
import json, time
from msgspec.structs import replace
from fp8gate.calibrate.compile_ahead import CompileAhead
from fp8gate.filter.shapes import LinearShape
from samples import PROTOCOL

if __name__ == "__main__":  # the worker imports this file again
    shape, broken = LinearShape(64, 64, 64), LinearShape(32, 64, 64)
    with CompileAhead("cpu", 1) as ahead:
        ahead.submit([shape], {"tensorwise": PROTOCOL})
        ahead.submit([broken], {"tensorwise": replace(PROTOCOL, inductor={"no_such_setting": True})})
        report = {"compiled": ahead.wait(shape), "broken": ahead.wait(broken), "workers": list(ahead._pool._processes)}
        print(json.dumps(report), flush=True)
        time.sleep(60)  # to be killed
"""

LOAD = """
import fp8gate.calibrate.sweep  # first, as in a sweep: a cache key may depend on who imports torch
import json
import torch
from torch._dynamo.utils import counters
from fp8gate.calibrate.linears import Operands, build_arm, compile_settings
from fp8gate.calibrate.numerics import acceptable, relative_errors
from fp8gate.calibrate.timing import CpuTimer
from fp8gate.filter.shapes import LinearShape

timer, operands = CpuTimer(), Operands.random(LinearShape(64, 64, 64), torch.device("cpu"))
with compile_settings({}):
    arm = timer.prepare(build_arm("tensorwise", operands, compiled=True))
caches = {name: count for name, count in counters["inductor"].items() if name.startswith("fxgraph_cache")}
print(json.dumps({"caches": caches, "right": acceptable(relative_errors(timer.results(arm), operands))}))
"""


def is_running(pid: int) -> bool:
    """False for a zombie too: one whose parent was killed may wait for ever to be reaped."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("inductor")


@pytest.fixture(scope="module")
def ahead(cache):
    """What a process that compiles ahead reported before it was killed."""
    if shutil.which("g++") is None:
        pytest.skip("compiling for the CPU needs g++")
    script = cache / "compile_ahead_script.py"
    script.write_text(COMPILE_AHEAD)
    paths = os.pathsep.join([str(Path(__file__).parents[1] / "src"), str(Path(__file__).parent)])
    process = python(str(script), TORCHINDUCTOR_CACHE_DIR=str(cache), PYTHONPATH=paths)
    line = process.stdout.readline()
    process.kill()
    process.wait()
    assert line, process.stderr.read()
    report = json.loads(line)
    yield report
    for worker in report["workers"]:
        if is_running(worker):
            os.kill(worker, signal.SIGKILL)
    process.communicate()


def test_a_variant_compiles_without_a_problem(ahead):
    assert ahead["compiled"] is None


def test_the_timing_process_loads_both_directions_from_the_cache(ahead, cache):
    output, errors = python("-c", LOAD, TORCHINDUCTOR_CACHE_DIR=str(cache)).communicate()
    assert output, errors
    report = json.loads(output)
    assert report["caches"] == {"fxgraph_cache_hit": 2}  # and no miss, no bypass
    assert report["right"]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last, torch.preserve_format])
def test_a_cache_key_does_not_depend_on_who_imported_torch(monkeypatch, memory_format):
    key = pickle.dumps(memory_format)
    assert pickle.loads(key) is memory_format
    monkeypatch.setattr(sys, "modules", {"first": SimpleNamespace(torch=torch), **sys.modules})
    assert pickle.dumps(memory_format) == key


def test_what_a_worker_cannot_compile_is_said(ahead):
    assert ahead["broken"].startswith("a compile worker failed: ")
    assert "no_such_setting" in ahead["broken"]


def test_workers_end_with_a_parent_that_was_killed(ahead):
    (worker,) = ahead["workers"]
    deadline = time.monotonic() + 10
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(worker)


def test_a_killed_worker_is_said_and_not_raised():
    with CompileAhead("cpu", 1) as ahead:
        ahead.submit([SHAPE], {"tensorwise": PROTOCOL})
        for worker in list(ahead._pool._processes):
            os.kill(worker, signal.SIGKILL)
        assert ahead.wait(SHAPE) == "a compile worker died; this process compiles the rest itself"


def test_without_workers_nothing_is_done():
    with CompileAhead("cpu", 0) as ahead:
        ahead.submit([SHAPE], {"tensorwise": replaced(PROTOCOL, inductor={"no_such_setting": True})})
        assert ahead.wait(SHAPE) is None
        assert ahead._pool is None


def test_usable_cores_are_those_of_this_process():
    allowed = os.sched_getaffinity(0)
    assert compile_ahead._usable_cores() == len(allowed)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert compile_ahead._usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(("cores", "workers"), [(16, 14), (2, 0), (1, 0)])
def test_two_cores_are_left_to_the_rest(monkeypatch, cores, workers):
    monkeypatch.setattr(compile_ahead, "_usable_cores", lambda: cores)
    assert CompileAhead("cuda").workers == workers
    assert CompileAhead("cuda", 3).workers == 3
