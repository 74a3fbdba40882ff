"""Measure one point: every arm in one session, interleaved in random order, until its decision is clear.

In: a shape, the recipes, a timer, each recipe's protocol. Out: a `PointRecord`. Failures of a point are results
(out_of_memory, failed), never exceptions, unless the device itself is lost.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import torch

from fp8gate.calibrate.linears import Operands, build_arm, compile_settings
from fp8gate.calibrate.numerics import acceptable, relative_errors
from fp8gate.calibrate.records import ArmName, ArmRecord, PointRecord, decided
from fp8gate.calibrate.statistics import paired_speedup
from fp8gate.calibrate.timing import Sample, Timer
from fp8gate.filter.shapes import LinearShape
from fp8gate.filter.table import Protocol, Recipe

SETTLE_S = 0.15
"""Rounds that are not counted before those that are: a GPU that idled boosts its clocks for about 0.1 s of load before
the power limit brings them down (by 13 % at (8192, 14336, 4096) on an H200), and a steady training run never idles."""


DETAIL_LENGTH = 2000  # Inductor's errors carry whole graphs; their first lines say what is wrong


class DeviceLostError(RuntimeError):
    """The GPU no longer answers in this process: every later point would fail with it."""


def measure_point(
    shape: LinearShape,
    protocols: Mapping[Recipe, Protocol],
    timer: Timer[Any],
    device: torch.device,
    rng: random.Random,
) -> PointRecord:
    """Time bf16 and the recipes of `protocols` at `shape` on `device`.

    Raises DeviceLostError, with the record as its argument, if the device fails for good.
    """
    start = time.perf_counter()
    torch._dynamo.reset()
    arms = _Session(shape, protocols, timer, device, rng).run()
    record = PointRecord(
        m=shape.m,
        k=shape.k,
        n=shape.n,
        measured_at=datetime.now(timezone.utc).replace(microsecond=0),
        seconds=round(time.perf_counter() - start, 3),
        arms=arms,
    )
    try:
        _release(timer)  # synchronizes: a GPU that failed for good says so here
    except RuntimeError as error:
        raise DeviceLostError(record) from error
    return record


class _Session:
    """The arms of one point, from operands to records."""

    def __init__(
        self,
        shape: LinearShape,
        protocols: Mapping[Recipe, Protocol],
        timer: Timer[Any],
        device: torch.device,
        rng: random.Random,
    ) -> None:
        self.shape, self.protocols, self.timer, self.device, self.rng = shape, protocols, timer, device, rng
        self.records: dict[ArmName, ArmRecord] = {}
        self.prepared: dict[ArmName, Any] = {}
        self.samples: dict[ArmName, list[Sample]] = {}

    def run(self) -> dict[ArmName, ArmRecord]:
        names: tuple[ArmName, ...] = ("bf16", *self.protocols)
        try:
            operands = Operands.random(self.shape, self.device)
        except Exception as error:
            return {name: _failure(error) for name in names}
        for name in names:
            self._prepare(name, operands)
        if "bf16" in self.prepared and len(self.prepared) > 1:
            try:
                self._run_rounds()
            except Exception as error:  # which arm it was is not known: none of them counts
                self.samples.clear()
                self.records.update({name: _failure(error) for name in self.prepared})
        return {name: self._record(name) for name in names}

    def _prepare(self, name: ArmName, operands: Operands) -> None:
        """Compile, capture and check one arm; what goes wrong becomes its record."""
        protocol = None if name == "bf16" else self.protocols[name]
        compiled = protocol is not None and protocol.compile
        inductor = protocol.inductor if protocol else {}
        try:
            with compile_settings(inductor):
                prepared = self.timer.prepare(build_arm(None if name == "bf16" else name, operands, compiled=compiled))
            errors = relative_errors(self.timer.results(prepared), operands)
        except Exception as error:
            self.records[name] = _failure(error)
            return
        if acceptable(errors):
            self.prepared[name] = prepared
            self.samples[name] = []
            self.records[name] = ArmRecord(errors=_rounded(errors))
        else:
            self.records[name] = ArmRecord(
                status="failed", errors=_rounded(errors), detail=f"wrong result: relative errors {errors}"
            )

    def _run_rounds(self) -> None:
        protocol = next(iter(self.protocols.values()))
        settled = time.perf_counter() + protocol.settle_s
        while time.perf_counter() < settled:
            self.timer.round(list(self.prepared.values()))
        for target in protocol.rounds:
            while len(self.samples["bf16"]) < target:
                self._run_round()
            if all(self._decided(name) for name in self.prepared if name != "bf16"):
                return

    def _run_round(self) -> None:
        order = list(self.prepared)
        self.rng.shuffle(order)
        for name, sample in zip(order, self.timer.round([self.prepared[name] for name in order]), strict=True):
            self.samples[name].append(sample)

    def _decided(self, recipe: Recipe) -> bool:
        bf16, fp8 = ([s.fwd_us + s.bwd_us for s in self.samples[name]] for name in ("bf16", recipe))
        protocol = self.protocols[recipe]
        return decided(paired_speedup(bf16, fp8, confidence=protocol.confidence), protocol)

    def _record(self, name: ArmName) -> ArmRecord:
        record, samples = self.records[name], self.samples.get(name, [])
        return ArmRecord(
            status=record.status,
            fwd_us=tuple(round(s.fwd_us, 3) for s in samples),
            bwd_us=tuple(round(s.bwd_us, 3) for s in samples),
            errors=record.errors,
            detail=record.detail,
        )


def _failure(error: Exception) -> ArmRecord:
    detail = f"{type(error).__name__}: {error}"[:DETAIL_LENGTH]
    return ArmRecord(status="out_of_memory" if _is_out_of_memory(error) else "failed", detail=detail)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if any(sign in str(error) for sign in ("out of memory", "ALLOC_FAILED", "can't allocate memory")):
        return True
    return error.__cause__ is not None and _is_out_of_memory(error.__cause__)


def _rounded(errors: dict[str, float]) -> dict[str, float | None]:
    return {name: None if error != error else round(error, 5) for name, error in errors.items()}


def _release(timer: Timer[Any]) -> None:
    """Collect the point's graphs (compiled functions hold them in reference cycles), then their memory."""
    gc.collect()
    timer.release()
