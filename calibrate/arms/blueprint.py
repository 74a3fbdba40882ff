"""A block of layers as it is trained, without its parameters: what every process needs to make its own.

In: any module with the inputs that it is called with. Out: a `Blueprint`, and from it modules with some linears
in float8, ready to compute.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from fp8gate.calibrate.arms.compilation import compiled_ahead
from fp8gate.calibrate.arms.linear import convert
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.names import block_role
from fp8gate.filter.contract.recipes import Casts, Recipe
from fp8gate.filter.contract.shapes import LinearShape


class BlockError(InputError):
    """A block that cannot be built or measured; the message says what was expected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """A block without its parameters: all that another process needs to build it.

    template: the module, on the meta device. buffers: its buffers, on the CPU. inputs: its keyword arguments. Inputs
    that require a gradient are meta tensors, filled with random data on use; the others stay on the CPU. shapes:
    (m, k, n) of each role. recomputed: under activation checkpointing. identity: a hash of what the block computes; it
    changes with the block's code.
    """

    template: nn.Module
    buffers: dict[str, Tensor]
    inputs: Mapping[str, Any]
    shapes: dict[str, LinearShape]
    recomputed: bool
    identity: str

    @classmethod
    def of(cls, module: nn.Module, inputs: Sequence[Any] | Mapping[str, Any], *, recomputed: bool) -> Blueprint:
        """The blueprint of any module, called with these arguments. Raises BlockError if it has nothing to convert."""
        named = dict(inputs) if isinstance(inputs, Mapping) else by_name(module, inputs)
        with torch.no_grad():
            _, shapes = shapes_in(module, lambda: module(**named))
        return cls.made(module, named, shapes, recomputed)

    @classmethod
    def made(
        cls,
        module: nn.Module,
        inputs: Mapping[str, Any],
        shapes: dict[str, LinearShape],
        recomputed: bool,
        about: str = "",
    ) -> Blueprint:
        """The blueprint of a module whose shapes are known. about: what else its identity depends on."""
        if not shapes:
            raise BlockError("block: expected an nn.Linear in it; found none")
        trained = {name: leaf for name, leaf in named_leaves(inputs) if leaf.requires_grad}
        if not trained:
            raise BlockError("example_inputs: expected one that requires a gradient, as in training; found none")
        weights = {f"{name}.weight": linear.weight for name, linear in linears_in(module)}
        for name, tensor in {**trained, **weights}.items():
            if tensor.dtype != torch.bfloat16:
                raise BlockError(f"{name}: expected torch.bfloat16, which float8 is compared with; got {tensor.dtype}")
        return cls(
            template=copy.deepcopy(module).to("meta"),
            buffers={name: buffer.cpu() for name, buffer in module.named_buffers()},
            inputs=tree_map_only(Tensor, lambda t: on_meta(t) if t.requires_grad else t.cpu(), inputs),
            shapes=shapes,
            recomputed=recomputed,
            identity=_identity(module, inputs, about),
        )

    def ready(
        self,
        roles: frozenset[str],
        recipe: Recipe | None,
        inductor: dict[str, bool] | None,
        device: str,
        casts: Casts = "inductor",
    ) -> ReadyBlock:
        """The block with these roles converted by the recipe, compiled with these settings and casts.

        inductor: None for the block as written.
        """
        module = copy.deepcopy(self.template)
        if roles and recipe:
            module = convert(module, recipe, lambda _, fqn: block_role(fqn) in roles)
        whole = Recomputed(module) if self.recomputed else module
        if inductor is None:
            return ReadyBlock(module, whole)
        inputs = tree_map_only(Tensor, on_meta, self.inputs)
        return ReadyBlock(module, compiled_ahead(whole, inputs, inductor, device, casts))


@dataclass(frozen=True, slots=True)
class ReadyBlock:
    """A block that only lacks its tensors."""

    module: nn.Module
    function: Callable[..., Any]


class Recomputed(nn.Module):
    """A block under activation checkpointing: its forward runs again before its backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, **inputs: Any) -> Any:
        return checkpoint(self.block, use_reentrant=False, preserve_rng_state=False, **inputs)


def linears_in(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, inner) for name, inner in module.named_modules() if isinstance(inner, nn.Linear))


def named_leaves(inputs: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """The tensors in a block's arguments, by the argument they are in, and their place in it if there are several."""
    named = []
    for name, value in inputs.items():
        leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        named += [(name if len(leaves) == 1 else f"{name}[{i}]", leaf) for i, leaf in enumerate(leaves)]
    return named


def by_name(module: nn.Module, args: Sequence[Any]) -> dict[str, Any]:
    return dict(inspect.signature(module.forward).bind_partial(*args).arguments)


def on_meta(tensor: Tensor) -> Tensor:
    return empty(tensor, torch.device("meta")).requires_grad_(tensor.requires_grad)


def empty(like: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)


def shapes_in(module: nn.Module, forward: Callable[[], Any]) -> tuple[Any, dict[str, LinearShape]]:
    """What a forward returns, and the shape that each role of the module multiplies in it.

    Raises BlockError if a role has several shapes, or if how many rows it multiplies depends on the data.
    """
    shapes: dict[str, set[LinearShape]] = {}

    def note(role: str) -> Callable[[nn.Linear, tuple[Any, ...]], None]:
        def hook(linear: nn.Linear, args: tuple[Any, ...]) -> None:
            m = math.prod(args[0].shape[:-1])
            if not isinstance(m, int):
                raise BlockError(f"{role}: how many rows it multiplies depends on the data")
            shapes.setdefault(role, set()).add(LinearShape(m, linear.in_features, linear.out_features))

        return hook

    roles = [(block_role(name), linear) for name, linear in linears_in(module)]
    hooks = [linear.register_forward_pre_hook(note(role)) for role, linear in roles]
    try:
        output = forward()
    finally:
        for hook in hooks:
            hook.remove()
    for role, found in shapes.items():
        if len(found) > 1:
            raise BlockError(f"{role}: expected linears of one shape, found {', '.join(map(str, sorted(found)))}")
    return output, {role: shape for role, _ in roles for shape in shapes.get(role, ())}


def _identity(module: nn.Module, inputs: Mapping[str, Any], about: str) -> str:
    """A hash of the modules, their code and settings, and the inputs."""
    code = sorted({_source(type(one)) for one in module.modules()})
    called = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in named_leaves(inputs)}
    return hashlib.sha256(f"{module} {code} {called} {about}".encode()).hexdigest()[:16]


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # written at a prompt, or in C
        return kind.__qualname__
