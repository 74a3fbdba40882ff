"""What libraries say though nobody can act on it is left out, and nothing else is."""

from __future__ import annotations

import logging
import os
import re
import warnings

import pytest
from samples import python

from fp8gate.calibrate.processes.library_noise import PROFILER_LINES, leave_out_noise, without_lines

PYTREE = (
    "<enum 'KernelPreference'> is an Enum subclass and is now natively supported by torch.compile as an opaque value "
    "type. Calling register_constant() on Enum subclasses is deprecated and will be an error in a future release."
)
FAILED = "Failed to load /site/torchao/_C_mxfp8.cpython-310-x86_64-linux-gnu.so: Could not load this library: /site"
SKIPPED = "Skipping import of cpp extensions due to incompatible torch version. Please upgrade to torch >= 2.11.0."
CUBLAS = (
    "Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set the primary context... "
    "(Triggered internally at /pytorch/aten/src/ATen/cuda/CublasHandlePool.cpp:270.)"
)


@pytest.mark.parametrize(
    ("logger", "message", "is_shown"),
    [
        ("torch.utils._pytree", PYTREE, False),
        ("torch.utils._pytree", "<class 'Tensor'> is already registered", True),
        ("torch._dynamo", PYTREE, True),
        ("torchao", FAILED, False),
        ("torchao", SKIPPED, False),
        ("torchao", "Failed to load the checkpoint", True),
        ("torchao.float8", FAILED, True),
    ],
)
def test_a_logger_loses_one_message(caplog, logger, message, is_shown):
    leave_out_noise()
    logging.getLogger(logger).addHandler(caplog.handler)  # torch's loggers do not hand on to the root
    logging.getLogger(logger).warning(message)
    logging.getLogger(logger).removeHandler(caplog.handler)
    assert bool(caplog.records) == is_shown


CYCLES = (
    "Warning: Profiler clears events at the end of each cycle.Only events from the current cycle will be reported."
    "To keep events across cycles, set acc_events=True."
)


@pytest.mark.parametrize(
    ("message", "is_shown"),
    [(CUBLAS, False), ("cuBLAS: out of workspace", True), (CYCLES, False), ("Warning: Profiler won't start", True)],
)
def test_two_warnings_are_left_out(message, is_shown):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        leave_out_noise()
        warnings.warn(message, UserWarning, stacklevel=1)
    assert bool(caught) == is_shown


def test_filters_are_not_heaped_up():
    leave_out_noise()
    before = list(logging.getLogger("torchao").filters)
    leave_out_noise()
    assert logging.getLogger("torchao").filters == before


def test_lines_that_are_written_past_python_are_left_out_too(capfd):
    steps = (
        b"USDT:2026-11-26 00:45:14 13792:13792 SyncActivityProfilerHandler.cpp:52] profiler_start\n"
        b"ERROR:2026-11-26 00:45:14 13792:13792 DeviceProperties.cpp:56] gpuGetDeviceCount failed with code 35\n"
        b"ERROR:2026-11-26 00:45:14 13792:13792 DeviceProperties.cpp:56] gpuGetDeviceCount failed with code 46\n"
        b"ERROR:2026-11-26 00:45:14 13792:13792 CuptiActivityProfiler.cpp:52] out of buffers\n"
        b"USDT:2026-11-26 00:45:14 13792:13792 SyncActivityProfilerHandler.cpp:59] profiler_stop\n"
        b"no end of line"
    )
    with without_lines(PROFILER_LINES):
        os.write(2, steps)
    os.write(2, b" here\n")
    assert capfd.readouterr().err == (
        "ERROR:2026-11-26 00:45:14 13792:13792 DeviceProperties.cpp:56] gpuGetDeviceCount failed with code 46\n"
        "ERROR:2026-11-26 00:45:14 13792:13792 CuptiActivityProfiler.cpp:52] out of buffers\nno end of line here\n"
    )


def test_an_error_gets_through_the_lines_that_are_left_out(capfd):
    def fail() -> None:
        with without_lines(PROFILER_LINES):
            os.write(2, b"why\n")
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        fail()
    assert capfd.readouterr().err == "why\n"


IMPORT = """
import fp8gate.calibrate.processes.library_noise
import sys
assert "torch" not in sys.modules
import logging, torchao
logging.getLogger("torchao").warning("something else")
"""
PROFILE = """
from fp8gate.calibrate.breakdown.profiler import record
import torch
x = torch.ones(4, 4)
assert record(torch.device("cpu"), lambda: x @ x, lambda: None)
"""


@pytest.mark.parametrize(("code", "shown"), [(IMPORT, "something else\n"), (IMPORT + PROFILE, "something else\n")])
def test_torchao_and_the_profiler_say_nothing_else(code, shown):
    process = python("-c", code)
    assert process.communicate() == ("", shown)
    assert process.returncode == 0


LIBRARIES = re.compile(r"^[VIWE]\d{4} |Warning|Failed to load|USDT|resource_tracker|site-packages")


@pytest.mark.slow
def test_a_breakdown_says_nothing_beside_its_answer():
    process = python("-m", "fp8gate", "breakdown", "64", "64", "64", "--recipe", "rowwise", "--device", "cpu")
    shown, said = process.communicate()
    assert "kernels sum to" in shown
    assert said == ""


@pytest.mark.slow
def test_a_sweep_with_a_worker_says_nothing_of_its_libraries(tmp_path):
    (tmp_path / "grid.yaml").write_text("m: [32]\nk: [32]\nn: [32, 64]\n")
    place = ["--out", str(tmp_path / "out"), "--grid", str(tmp_path / "grid.yaml"), "--device", "cpu", "--workers", "1"]
    process = python("-m", "fp8gate", "calibrate", "--recipes", "rowwise", *place, OMP_NUM_THREADS="1")
    _, said = process.communicate()
    assert "[1/" in said
    assert [line for line in said.splitlines() if LIBRARIES.search(line)] == []
