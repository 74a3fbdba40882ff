"""What the ranks of tests/test_casts_ranks.py do: they compile a divided MLP with fp8gate.casts and without."""

from __future__ import annotations

import contextlib
import json
import logging
from typing import Any

import torch
import torch.distributed as dist
from casts_graphs import assert_equal_bits
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torchao.float8 import Float8LinearConfig, convert_to_float8_training

from fp8gate.casts import graph_pass

WIDTH, HIDDEN, TOKENS = 64, 128, 32


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False, dtype=torch.bfloat16)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.up(x)))


def compare(*, recomputes: bool) -> None:
    """Rank 0 prints what the pass says of each graph, as JSON. Each rank raises if a bit differs.

    recomputes: under activation checkpointing.
    """
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(27)
    module = convert_to_float8_training(Mlp(), config=Float8LinearConfig.from_recipe_name("rowwise"))
    plan = {
        "": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    parallelize_module(module, mesh, plan)
    if recomputes:
        module = checkpoint_wrapper(module)
    torch.manual_seed(dist.get_rank())
    x, grad = (torch.randn(2, TOKENS // 2, WIDTH, dtype=torch.bfloat16) for _ in range(2))
    said: list[str] = []
    note = logging.Handler()
    note.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fp8gate.casts").addHandler(note)
    logging.getLogger("fp8gate.casts").setLevel(logging.INFO)
    without = step(module, x, grad, contextlib.nullcontext())
    assert not said
    assert_equal_bits(step(module, x, grad, graph_pass.replaced(least_elements=0)), without)
    if dist.get_rank() == 0:
        print(json.dumps(said))
    dist.destroy_process_group()


def step(module: nn.Module, x: Tensor, grad: Tensor, context: contextlib.AbstractContextManager[None]) -> list[Tensor]:
    """The output and all gradients of this rank, compiled anew inside the context."""
    torch._dynamo.reset()
    leaf = x.detach().clone().requires_grad_()
    with context, inductor_config.patch({"emulate_precision_casts": True, "fx_graph_cache": False}):
        output: Any = torch.compile(module, dynamic=False)(leaf)
        gradients = torch.autograd.grad(output, [leaf, *module.parameters()], grad)
    return [one.to_local() if isinstance(one, DTensor) else one for one in (output.detach(), *gradients)]
