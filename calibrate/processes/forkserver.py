"""The fork server: it imports once what all children need, never touches the device, and children are forked from it.

In: nothing. Out: a multiprocessing context. Light to import, so that it can start before this process imports torch.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import tempfile
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.context import ForkServerContext

from fp8gate.calibrate.device.registry import asked_kinds
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.table import DeviceKindName

PRELOADED = (
    "fp8gate.calibrate.processes.library_noise",  # before torch is
    "fp8gate.calibrate.processes.progress_bar_lock",
    "fp8gate.calibrate.planning.block_worker",
    "fp8gate.calibrate.points.point_worker",
    "fp8gate.calibrate.processes.compile_cache_keys",
    "torch._inductor.compile_fx",
    "torch._inductor.lowering",
    "torch._inductor.codegen.cuda_combined_scheduling",
    "torch._inductor.fx_passes.joint_graph",
    "torch._inductor.fx_passes.post_grad",
    "torch._inductor.runtime.triton_heuristics",
    "torch._dynamo.backends.inductor",
)


def start_server() -> ForkServerContext:
    """The context that starts children, its server running. Raises InputError if its socket's path is too long."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else asking for a GPU spoils it for forks
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    try:
        with _ctrl_c_blocked():
            multiprocessing.forkserver.ensure_running()
    except OSError as error:
        if "AF_UNIX" not in str(error):
            raise
        where = tempfile.gettempdir()
        raise InputError(f"TMPDIR: expected a path short enough for a socket; got {where}") from error
    return context


@contextlib.contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """What this thread starts never hears of Ctrl-C, which is the parent's to handle, from its first moment on."""
    resource_tracker.ensure_running()  # or the server starts it, which unblocks Ctrl-C
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def start_early(kind: DeviceKindName | None) -> None:
    """Let the server import torch while this process does, where there is a device to compile for."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return
    if any(one.defaults.compiles and one.count() for one in asked_kinds(kind)):
        start_server()


def kill_server() -> None:
    """End a server that does not answer; the next `start_server` starts another."""
    pid = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]  # no public name
    if pid is not None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # else `start_server` may still find it alive
