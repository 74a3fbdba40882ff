"""A small block, a small model and a plan of it for the tests of plans."""

from __future__ import annotations

import time
from collections.abc import Iterable
from multiprocessing import parent_process
from typing import Any

import torch
from builders import DEVICE, MEASURED_AT, SOFTWARE_HERE
from torch import Tensor, nn

from fp8gate.calibrate.arms.block import Block as RealBlock
from fp8gate.calibrate.arms.blueprint import Blueprint
from fp8gate.calibrate.device.cpu import CpuTimer
from fp8gate.calibrate.device.timer import Results
from fp8gate.filter.contract.plans.plan import Candidate, Plan, PlanProtocol, TableUsed

TINY_CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 32,
}
PROTOCOL = PlanProtocol(
    timer="wall_clock",
    compile=False,
    inductor={},
    l2="cold",
    data="random",
    settle_s=0.0,
    run_s=0.001,
    pause_s=0.0,
    screening=1,
    final=6,
    confidence=0.95,
    noise=0.1,
    seed=0,
)
SHAPES = {"self_attn.q_proj": (32, 64, 64), "self_attn.k_proj": (32, 64, 32), "mlp.gate_proj": (32, 64, 128)}
CANDIDATES = (
    Candidate((), 7, 100.0, 200.0, 1.0, 1.0, 1.0, 1.0, 0.0, "measured"),
    Candidate(("self_attn.q_proj",), 7, 90.0, 180.0, 1.111, 1.1, 1.12, 1.05, 0.04, "measured"),
    Candidate(("mlp.gate_proj",), 1, 100.0, 201.0, 0.9967, 0.9917, 1.002, 1.01, 0.03, "measured"),
    Candidate(("self_attn.q_proj", "mlp.gate_proj"), 0, *(None,) * 5, 1.06, None, "out_of_memory"),
)


class Block(nn.Module):
    """Two linears and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32, dtype=torch.bfloat16)
        self.inner = nn.Linear(32, 64, bias=False, dtype=torch.bfloat16)
        self.outer = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.outer(torch.relu(self.inner(self.norm(x))))


class HangsInChildren(Block):
    """It never returns in a process that the planning one has started."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        if parent_process():
            time.sleep(3600)
        return super().forward(x, scale)


def block_input() -> Tensor:
    return torch.randn(16, 32, dtype=torch.bfloat16, requires_grad=True)


def block_results(blueprint: Blueprint, roles: Iterable[str] = (), inductor: Any = None) -> tuple[Results, float]:
    """What a block computes on the CPU with these roles in rowwise float8, and its error."""
    torch.manual_seed(0)
    block = RealBlock(blueprint, torch.device("cpu"))
    timer, arm = CpuTimer(2**16), block.arm(blueprint.ready(frozenset(roles), "rowwise", inductor, "cpu"))
    found: list[Results] = []
    error, _ = block.error(lambda: found.append(timer.results(arm)) or found[0])
    return found[0], error


def make_plan(**fields: Any) -> Plan:
    """A plan that converts q_proj of a block of three linears; k_proj is not divisible."""
    made: dict[str, Any] = {
        "recipe": "rowwise",
        "model": "tiny",
        "tokens": 32,
        "sequence": 32,
        "tp": 1,
        "recompute": "none",
        "device": DEVICE,
        "software": SOFTWARE_HERE,
        "protocol": PROTOCOL,
        "block": "0123456789abcdef",
        "measured_at": MEASURED_AT,
        "shapes": SHAPES,
        "indivisible": ("self_attn.k_proj",),
        "left_alone": ("mlp.experts",),
        "table": TableUsed(measured_at=MEASURED_AT, torch="2.13.0", min_speedup=1.02, convert=("mlp.gate_proj",)),
        "torchao": ("self_attn.q_proj", "mlp.gate_proj"),
        "control": 0.998,
        "convert": ("self_attn.q_proj",),
        "exhaustive": False,
        "candidates": CANDIDATES,
    }
    return Plan(**{**made, **fields})


def meta_block(sizes: dict[str, tuple[int, int]]) -> nn.Module:
    """A block of linears alone, on the meta device. sizes: in_features and out_features, by role."""
    module = nn.Module()
    for role, (k, n) in sizes.items():
        *parents, last = role.split(".")
        inner: Any = module
        for parent in parents:
            inner = inner._modules.setdefault(parent, nn.Module())
        inner.add_module(last, nn.Linear(k, n, device="meta"))
    return module
