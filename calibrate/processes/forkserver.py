"""The process that workers are forked from: it imports what they all need, once, and never touches the device.

In: nothing. Out: a multiprocessing context. Light to import, so that it can start before this process imports torch.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import tempfile
from multiprocessing.context import ForkServerContext

from fp8gate.calibrate.device.cuda.nvml import gpu_count

PRELOADED = (
    "fp8gate.calibrate.processes.ignore_interrupts",
    "fp8gate.calibrate.planning.block_worker",
    "fp8gate.calibrate.points.point_worker",
    "fp8gate.calibrate.processes.compiler_keys",
    "torch._inductor.compile_fx",
    "torch._inductor.lowering",
    "torch._inductor.codegen.cuda_combined_scheduling",
    "torch._inductor.fx_passes.joint_graph",
    "torch._inductor.fx_passes.post_grad",
    "torch._inductor.runtime.triton_heuristics",
    "torch._dynamo.backends.inductor",
)


def start_server() -> ForkServerContext:
    """The context that starts workers, its server running: it imports once what they need.

    Raises ValueError if the server's socket has no place.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else asking for a GPU spoils it for forks
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    try:
        multiprocessing.forkserver.ensure_running()
    except OSError as error:
        if "AF_UNIX" not in str(error):
            raise
        raise ValueError(f"TMPDIR: expected a path short enough for a socket; got {tempfile.gettempdir()}") from error
    return context


def start_early() -> None:
    """Let the server import torch while this process does, where there is a GPU and so something to compile."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") != "" and gpu_count():
        start_server()
