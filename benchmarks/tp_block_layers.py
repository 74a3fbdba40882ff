"""A rank's part of a model's decoder layers, under tensor parallelism with sequence parallelism.

In: a `Subject` whose layers are whole, a mesh. Out: layers with any set of their linears in float8. Each is converted,
then divided, then compiled by itself, as torchtitan does. All sets compute with the same tensors, so that many fit into
memory.

Between layers a rank holds its part of each sequence. It gathers the normalized tokens of all ranks before attention
and before the MLP, and reduces and scatters what comes out of them. All of that is bf16, whatever the set. A linear
whose scales are taken along a divided dimension needs the largest values of all ranks: with `rowwise` each float8
linear adds two small all-reduces, which no plan of a single GPU sees.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils._pytree import tree_map_only
from torchao.float8.float8_linear import Float8Linear

import fp8gate.casts
from fp8gate.calibrate.arms.compilation import MAX_ALIVE, put_tensors
from fp8gate.calibrate.arms.linear import WEIGHT_STD, convert
from fp8gate.calibrate.planning.subject import Subject
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.names import block_role
from fp8gate.filter.contract.recipes import Casts, Recipe

HIDDEN = "hidden_states"  # what transformers calls the input of a layer and of its attention
COLWISE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWWISE = ("self_attn.o_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
SEQUENCE_DIM = 1


@dataclass(frozen=True, slots=True)
class Results:
    """What a check run gave on this rank: what the layers add to their input, and the gradients."""

    added: Tensor
    gradients: tuple[Tensor, ...]

    def error(self, right: Results) -> float:
        """The largest |result - right| / |right| (Frobenius); infinite if one is not finite."""
        pairs = zip((self.added, *self.gradients), (right.added, *right.gradients), strict=True)
        errors = [_relative_error(one, other) for one, other in pairs]
        return max(error if math.isfinite(error) else math.inf for error in errors)


class TpLayers:
    """The tensors of this rank, which all sets share, and the layers that compute with them.

    x: this rank's part of the input, (batch, sequence / tp, hidden).
    """

    def __init__(self, subject: Subject, mesh: DeviceMesh, layers: int, device: torch.device, seed: int) -> None:
        self._template, self._mesh = subject.blueprint.template, mesh
        torch.manual_seed(seed + mesh.get_local_rank())
        divided = parallelize(copy.deepcopy(self._template), mesh)
        parameters = dict(divided.named_parameters())
        self.parameters = [
            {name: _random_parameter(name, one, device) for name, one in parameters.items()} for _ in range(layers)
        ]
        self._buffers = {name: buffer.to(device) for name, buffer in subject.blueprint.buffers.items()}
        inputs = tree_map_only(
            Tensor, lambda tensor: tensor if tensor.is_meta else tensor.to(device), dict(subject.blueprint.inputs)
        )
        batch, sequence, hidden = inputs.pop(HIDDEN).shape
        if sequence % mesh.size():
            raise InputError(f"tokens: expected sequences that {mesh.size()} ranks divide; got {sequence} tokens")
        self._inputs = tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)
        shape = (batch, sequence // mesh.size(), hidden)
        self.x, self._grad_output = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
        self._check_x = (torch.randn_like(self.x) + torch.randn_like(self.x[:1, :1])) / math.sqrt(2)
        for leaf in (self.x, self._check_x):
            leaf.requires_grad_()

    def make(
        self, roles: Collection[str], recipe: Recipe, inductor: dict[str, bool] | None, casts: Casts = "inductor"
    ) -> TpStack:
        """The layers with these roles in float8.

        inductor: settings to compile them with; None to leave them eager. casts: who compiles those of float8. Each
        call compiles anew, even if it asks for the same again.
        """
        stack = []
        for parameters in self.parameters:
            layer = copy.deepcopy(self._template)
            if roles:
                layer = convert(layer, recipe, lambda _, fqn: block_role(fqn) in roles)
            converted = sum(isinstance(module, Float8Linear) for module in layer.modules())
            if converted != len(roles):
                raise InputError(f"{recipe}: expected {len(roles)} linears in float8, torchao converted {converted}")
            parallelize(layer, self._mesh)
            put_tensors(layer, {**parameters, **self._buffers})
            stack.append(layer)
        if inductor is not None:
            _compile(stack, inductor)
        return TpStack(self, stack, casts)

    def forward(self, stack: Iterable[nn.Module], x: Tensor) -> Tensor:
        for layer in stack:
            x = layer(**{HIDDEN: x}, **self._inputs)
        return x

    def step(self, stack: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and the gradients of the input and of every parameter."""
        output = self.forward(stack, x)
        wanted = (x, *(one for parameters in self.parameters for one in parameters.values()))
        return output, torch.autograd.grad(output, wanted, self._grad_output)

    def check(self, stack: Sequence[nn.Module]) -> Results:
        """Rows share half their variance: with independent rows attention averages to nearly zero."""
        output, gradients = self.step(stack, self._check_x)
        added = (output - self._check_x).detach()
        return Results(added, tuple(map(local, gradients)))


@dataclass(frozen=True, slots=True)
class TpStack:
    """Layers with one set of linears in float8, ready to run."""

    owner: TpLayers
    layers: list[nn.Module]
    casts: Casts

    def start(self) -> Results:
        """Run for the first time, which compiles and tunes.

        A graph break, too many graphs, or casts that fp8gate's pass does not know, are an error.
        """
        import torch._dynamo.config

        limits = torch._dynamo.config.patch(recompile_limit=MAX_ALIVE, accumulated_recompile_limit=MAX_ALIVE)
        replaced = fp8gate.casts.replaced(strict=True) if self.casts == "fp8gate" else fp8gate.casts.not_replaced()
        with limits, torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), replaced:
            return self.owner.check(self.layers)

    def step(self) -> None:
        """Forward and backward. Raises if this would compile again."""
        with torch.compiler.set_stance("fail_on_recompile"):
            self.owner.step(self.layers, self.owner.x)


def require_llama(roles: Collection[str]) -> None:
    """Raises InputError for layers that have other linears than Llama's."""
    if set(roles) != {*COLWISE, *ROWWISE}:
        raise InputError(f"model: expected layers with the linears {', '.join((*COLWISE, *ROWWISE))}; found {roles}")


def parallelize(layer: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Divide a layer in place. Its attention is called by keyword, its MLP by position."""
    part, whole = Shard(SEQUENCE_DIM), Replicate()
    styles: dict[str, ParallelStyle] = {name: SequenceParallel(sequence_dim=SEQUENCE_DIM) for name in NORMS}
    styles |= {name: ColwiseParallel() for name in COLWISE}
    styles |= {name: RowwiseParallel(output_layouts=part) for name in ROWWISE}
    styles["self_attn"] = PrepareModuleInput(
        input_kwarg_layouts={HIDDEN: part}, desired_input_kwarg_layouts={HIDDEN: whole}
    )
    styles["mlp"] = PrepareModuleInput(input_layouts=(part,), desired_input_layouts=(whole,))
    return parallelize_module(layer, mesh, styles)


def _compile(stack: Iterable[nn.Module], inductor: dict[str, bool]) -> None:
    """One backend for all layers of a set, so that they share a graph, and another one for the next set."""
    from torch._inductor.compile_fx import compile_fx

    backend: Callable[..., Any] = functools.partial(compile_fx, config_patches=inductor)
    for layer in stack:
        layer.compile(backend=backend, fullgraph=True, dynamic=False)


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _random_parameter(name: str, like: Tensor, device: torch.device) -> nn.Parameter:
    """Of the same placement. Each rank draws its own part; norms are 1 and biases 0."""
    tensor = torch.empty(local(like).shape, dtype=like.dtype, device=device)
    if tensor.ndim > 1:
        tensor.normal_(std=WEIGHT_STD)
    else:
        tensor.fill_(0.0 if name.endswith("bias") else 1.0)
    if isinstance(like, DTensor):
        tensor = DTensor.from_local(tensor, like.device_mesh, like.placements, run_check=False)
    return nn.Parameter(tensor)


def _relative_error(result: Tensor, right: Tensor) -> float:
    right = right.float()
    return float(torch.linalg.vector_norm(result.float() - right) / torch.linalg.vector_norm(right))
