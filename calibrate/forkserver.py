"""The process that workers are forked from: it imports what they all need, once, and never touches the device.

In: nothing. Out: a multiprocessing context. Light to import, so that it can start before this process imports torch.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
from multiprocessing.context import ForkServerContext

PRELOADED = (
    "fp8gate.calibrate.worker",
    "torch._inductor.compile_fx",
    "torch._inductor.lowering",
    "torch._inductor.codegen.cuda_combined_scheduling",
    "torch._inductor.fx_passes.joint_graph",
    "torch._inductor.fx_passes.post_grad",
    "torch._inductor.runtime.triton_heuristics",
    "torch._dynamo.backends.inductor",
)


def forkserver_context() -> ForkServerContext:
    """The context that starts workers; its server imports them once."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else asking for a GPU spoils it for forks
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def start_early() -> None:
    """Let the server import torch while this process does, where there is a GPU and so something to compile."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return
    forkserver_context()
    multiprocessing.forkserver.ensure_running()
