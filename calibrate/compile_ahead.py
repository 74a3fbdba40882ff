"""Fill Inductor's cache from worker processes, so that the process that times only loads what it runs.

In: variants (shape, recipe, Inductor settings) in the order they will be timed. Workers trace with fake tensors and
compile forward and backward, but launch nothing and allocate nothing: no kernel of theirs disturbs a timing. Inductor
tunes launch configurations at a kernel's first launch, so that happens in the timing process alone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

from fp8gate.filter.shapes import LinearShape
from fp8gate.filter.table import Protocol, Recipe

PARENT_POLL_S = 1.0
SPARE_CORES = 2  # one for the timing process, one for the rest of the machine


class CompileAhead:
    """A pool of compile workers; a context that ends them. Without workers it does nothing, and waits for nothing."""

    def __init__(self, device: str, workers: int | None = None) -> None:
        self.device = device
        self.workers = max(0, _usable_cores() - SPARE_CORES) if workers is None else workers
        self._pool: ProcessPoolExecutor | None = None
        self._compiled: dict[LinearShape, list[Future[None]]] = {}

    def __enter__(self) -> CompileAhead:
        if self.workers:
            context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
            self._pool = ProcessPoolExecutor(
                self.workers, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool:
            self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def submit(self, shapes: Iterable[LinearShape], protocols: Mapping[Recipe, Protocol]) -> None:
        """Ask for these points, in this order."""
        if not self._pool:
            return
        for shape in shapes:
            self._compiled[shape] = [
                self._pool.submit(compile_variant, shape, recipe, protocol.inductor, self.device)
                for recipe, protocol in protocols.items()
            ]

    def wait(self, shape: LinearShape) -> str | None:
        """Block until a point is in the cache. Returns what went wrong, if anything did.

        What failed here is compiled again by the timing process, which records the error if it comes again.
        """
        problem = None
        for future in self._compiled.pop(shape, ()):
            try:
                future.result()
            except BrokenProcessPool:
                problem = "a compile worker died; this process compiles the rest itself"
            except Exception as error:
                problem = f"a compile worker failed: {type(error).__name__}: {error}"
        return problem


def compile_variant(shape: LinearShape, recipe: Recipe, inductor: dict[str, bool], device: str) -> None:
    """Compile one variant, forward and backward, into Inductor's cache, and run none of it."""
    import torch
    import torch._functorch.config
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fp8gate.calibrate.linears import build_linear, compile_settings

    torch._dynamo.reset()
    both_ways = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    with FakeTensorMode(), compile_settings(inductor), both_ways:
        x = torch.empty(shape.m, shape.k, device=device, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.nn.Parameter(torch.empty(shape.n, shape.k, device=device, dtype=torch.bfloat16))
        compiled = torch.compile(build_linear(recipe, weight), dynamic=False, backend=_compile_only)
        try:
            compiled(x)
        except _Compiled:
            return
    raise RuntimeError("the compiled function ran instead of stopping after compilation")


class _Compiled(Exception):
    """Everything is compiled; raised where the compiled code would run."""


def _compile_only(graph: object, example_inputs: object) -> object:
    from torch._inductor.compile_fx import compile_fx

    compile_fx(graph, example_inputs)  # type: ignore[arg-type]

    def stop(*_: object) -> None:
        raise _Compiled

    return stop


def _usable_cores() -> int:
    """The cores this process may run on, which a job scheduler may have made fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(parent: int) -> None:
    """Compile on one thread, leave Ctrl-C to the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A killed parent cannot end its workers, and a pool's worker would wait for it for ever."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os._exit(1)
