"""What the ranks of tests/test_tp_block.py do: they compare layers that are divided among them with whole ones."""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor import compile_fx
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import fp8gate.casts
from fp8gate.calibrate.planning.subject import model_subjects

ROOT = Path(__file__).parent.parent
COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")
LAYERS = 2
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def compare(config: Path, tokens: int) -> None:
    """Rank 0 prints how far the divided layers are from whole ones, and how often they communicate, as JSON."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from tp_block_layers import TpLayers

    dist.init_process_group("gloo")
    (subject,), _ = model_subjects(str(config), tokens=tokens, sequence=None, tp=1, recomputed=False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    layers = TpLayers(subject, mesh, LAYERS, torch.device("cpu"), 0)
    bf16 = layers.make((), "rowwise", None)
    right = bf16.start()
    found: dict[str, Any] = {"from whole": _distance_from_whole(layers, bf16), "errors": [], "collectives": []}
    for roles in ((), MLP, tuple(subject.possible)):
        stack = layers.make(roles, "rowwise", None)
        found["errors"].append(stack.start().error(right))
        with Collectives() as collectives:
            stack.step()
        found["collectives"].append([collectives.counts[name] for name in COLLECTIVES])
    asked: list[tuple[bool, bool]] = []
    compile_fx.compile_fx = functools.partial(_compile_quickly, asked)  # type: ignore[assignment]
    compiled = [
        layers.make(roles, "rowwise", {"emulate_precision_casts": bool(roles)}, casts)
        for roles, casts in (((), "inductor"), ((), "inductor"), (MLP[:1], "inductor"), (MLP[:1], "fp8gate"))
    ]
    fp8gate.casts.enable()
    found["errors compiled"] = [one.start().error(right) for one in compiled]
    found["settings"] = asked
    for one in compiled:
        one.step()  # raises if it compiles again
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def _compile_quickly(asked, graph, inputs, *, config_patches):
    """As Inductor's function, without Inductor: it takes minutes for a layer on a busy machine."""
    asked.append((config_patches["emulate_precision_casts"], fp8gate.casts.is_enabled()))
    return aot_eager(graph, inputs)


class Collectives(TorchDispatchMode):
    """Counts the operations by which ranks communicate."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # it communicates by operations on plain tensors
        name = operation.__name__.partition(".")[0]
        if operation.namespace == "_c10d_functional" and name in COLLECTIVES:
            self.counts[name] += 1
        return operation(*args, **(kwargs or {}))


def _distance_from_whole(layers, stack) -> list[float]:
    """Of the output and of the input's gradient, relative."""
    from tp_block_layers import HIDDEN

    output, gradients = layers.step(stack.layers, layers.x)
    x = _gathered(layers.x).requires_grad_()
    y = x
    for parameters in layers.parameters:
        whole = {name: one.full_tensor() for name, one in parameters.items()}
        inputs = {HIDDEN: y, **layers._inputs}
        y = torch.func.functional_call(layers._template, whole, (), inputs)
    (gradient,) = torch.autograd.grad(y, (x,), _gathered(layers._grad_output))
    pairs = (_gathered(output), y.detach()), (_gathered(gradients[0]), gradient)
    return [float((one.float() - other.float()).norm() / other.float().norm()) for one, other in pairs]


def _gathered(part: Tensor) -> Tensor:
    parts = [torch.empty_like(part.detach()) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.detach().contiguous())
    return torch.cat(parts, dim=1)
