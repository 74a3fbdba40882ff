"""One process's part of benchmarks/block_settings.py: it compiles sets of roles under settings, and visits them.

In: a `SettingsJob`, then requests as a plan's process has them, whose sets of roles also name settings. Out: answers; a
set that is loaded comes with what it cost to compile, and how much memory it takes.

Everything that is compiled has a cache of its own, empty at first: no setting can find what another one compiled, and
compile times are those of a first run. A cache that is kept serves the same set and settings in a later call.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from block_settings_list import CASTS_ON, is_setting, settings_on

from fp8gate.calibrate.arms.block import BlockArm
from fp8gate.calibrate.arms.failure import Failure
from fp8gate.calibrate.device.registry import kind_of
from fp8gate.calibrate.planning.block_worker import Answer, BlockBench, Done, PlanJob
from fp8gate.calibrate.planning.block_worker_pool import BlockWorkerPool
from fp8gate.calibrate.planning.search import RoleSet
from fp8gate.calibrate.processes.channel import Channel
from fp8gate.calibrate.processes.limits import Limits
from fp8gate.filter.contract.recipes import Casts

STEP_S = 1200.0  # a layer has dozens of kernels, and coordinate descent tunes each for many seconds
COMPILED = "compiled"  # a file in a cache that is complete
LAUNCH = re.compile(r"^\s+(?:\w+\.run|cpp_\w+)\(", re.MULTILINE)
CAST = re.compile(r"= torch\.ops\.fp8gate\.\w+\.default\(")
IRRELEVANT = re.compile(r"^\s*(?:#|inductor_meta=).*$|\s#.*$", re.MULTILINE)
"""In generated code: comments, in which compilations are numbered, and the settings, which are noted beside each
kernel even where they change nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingsJob(PlanJob):
    """cache: a folder for what is compiled."""

    cache: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a set took to get ready.

    compile_s: ahead of time, on one thread; None if a kept cache had it. load_s: tuning, capturing and checking.
    peak_bytes: memory that forward and backward take at most beside parameters and inputs; None on a CPU. launches: of
    generated kernels. casts: operands that the kernels of fp8gate.casts cast. code: a hash of what is generated. The
    last three are None where nothing is compiled.
    """

    compile_s: float | None
    load_s: float
    peak_bytes: int | None
    launches: int | None
    casts: int | None
    code: str | None


@dataclass(frozen=True, slots=True)
class Loaded(Done):
    """A set that is ready to be visited."""

    cost: Cost | None = None


class SettingsBench(BlockBench):
    """The sets that this process has compiled, each under its settings."""

    job: SettingsJob

    def __init__(self, job: SettingsJob) -> None:
        super().__init__(job)
        self._compiled: dict[RoleSet, tuple[float | None, list[str]]] = {}

    def compile(self, roles: RoleSet) -> Done:
        folder = self._cache_folder(roles)
        was_there, begin = (folder / COMPILED).exists(), time.perf_counter()
        with settings_on(settings_in(roles)), _cache_in(folder), _noted_code() as sources, self._real_benchmarks():
            done = super().compile(roles)
        compile_s = time.perf_counter() - begin
        folder.mkdir(parents=True, exist_ok=True)
        (folder / COMPILED).touch()
        self._compiled[roles] = (None if was_there else round(compile_s, 3)), sources
        return done

    def casts_of(self, roles: RoleSet) -> Casts:
        return "fp8gate" if CASTS_ON in roles else super().casts_of(roles)

    def load(self, roles: RoleSet) -> Done | Failure:
        """Settings and cache are those of compiling: some settings act at a kernel's first launch."""
        _, _, block = self._on_device()
        arm, begin = block.arm(self._ready[roles]), time.perf_counter()
        with settings_on(settings_in(roles)), _cache_in(self._cache_folder(roles)):
            done = super().load(roles)
        if isinstance(done, Failure):
            return done
        load_s = time.perf_counter() - begin
        compile_s, sources = self._compiled.pop(roles)
        cost = Cost(
            compile_s=compile_s,
            load_s=round(load_s, 3),
            peak_bytes=_peak_bytes(arm, self.job.device),
            launches=_count(LAUNCH, sources),
            casts=_count(CAST, sources),
            code=code_hash(sources) if sources else None,
        )
        return Loaded(done.error, cost)

    def _real_benchmarks(self) -> contextlib.AbstractContextManager[object]:
        """Compiling ahead traces with fake tensors; kernels that `benchmark_fusion` runs meanwhile need real ones."""
        if self.job.device.type != "cuda":
            return contextlib.nullcontext()
        from torch._inductor.codegen.triton import TritonScheduling
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        benchmark = TritonScheduling.benchmark_codegened_module

        def on_real_tensors(*args: Any, **kwargs: Any) -> Any:
            with unset_fake_temporarily():
                return benchmark(*args, **kwargs)

        return mock.patch.object(TritonScheduling, "benchmark_codegened_module", on_real_tensors)

    def _cache_folder(self, roles: RoleSet) -> Path:
        name = hashlib.sha256(", ".join(sorted(roles)).encode()).hexdigest()[:16]
        return self.job.cache / self.job.blueprint.identity / name


def serve_settings(channel: Channel, job: SettingsJob) -> None:
    """Answer requests until dismissed."""
    bench = SettingsBench(job)
    while True:
        channel.send(bench.answer(channel.receive()))


class SettingsPool(BlockWorkerPool):
    """The processes, and what each set that they have loaded took to get ready."""

    def __init__(self, job: SettingsJob, count: int, *, until: float = math.inf) -> None:
        super().__init__(job, count, until=until, serve=serve_settings, limits=Limits(step_s=STEP_S))
        self._bench = SettingsBench(job)
        self._costs: dict[RoleSet, Cost] = {}

    def load(self, roles: RoleSet) -> Answer:
        answer = super().load(roles)
        if isinstance(answer, Loaded) and answer.cost:
            self._costs[roles] = answer.cost
        return answer

    def cost(self, roles: RoleSet) -> dict[str, Any]:
        """The fields of its `Cost`; none of a set that is not loaded."""
        return asdict(self._costs[roles]) if roles in self._costs else {}


def settings_in(roles: RoleSet) -> list[str]:
    """The settings that a set of roles names."""
    return sorted(filter(is_setting, roles))


def _count(call: re.Pattern[str], sources: Sequence[str]) -> int | None:
    return sum(len(call.findall(source)) for source in sources) if sources else None


def code_hash(sources: Sequence[str]) -> str:
    """The same for the same kernels in the same order, whatever settings they were compiled with."""
    text = "\n".join(IRRELEVANT.sub("", source) for source in sources)
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:8]


@contextlib.contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Let Inductor and Triton keep what they compile there, and find nothing else."""
    from torch._inductor.utils import clear_caches

    places = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    clear_caches()
    try:
        with mock.patch.dict(os.environ, places):
            yield
    finally:
        clear_caches()


@contextlib.contextmanager
def _noted_code() -> Iterator[list[str]]:
    """What Inductor generates, forward and backward; empty where nothing is compiled."""
    from torch._inductor.graph import GraphLowering

    sources: list[str] = []
    with mock.patch.object(GraphLowering, "save_output_code", sources.append):
        yield sources


def _peak_bytes(arm: BlockArm, device: torch.device) -> int | None:
    """Of the second of two runs: the first one may have to make room for cuBLAS."""
    if device.type != "cuda":
        return None
    for _ in range(2):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        arm.backward(arm.forward())
    peak: int = torch.cuda.max_memory_allocated(device)
    kind_of(device).synchronize(device)
    kind_of(device).release_memory(device)
    return peak - before
