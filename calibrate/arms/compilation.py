"""Compile a module, forward and backward, before there is anything to run it on.

In: a module and inputs on the meta device, Inductor settings. Out: a function that later runs over real tensors without
compiling again. For a linear, a shape and a recipe are enough.
Tracing uses fake tensors, so compiling launches no kernel and allocates no device memory. Many processes can compile
while one times, except in the moments in which Inductor loads what it has compiled (device/timing_lock.py). Inductor
tunes launch configurations at a kernel's first launch, in the process that runs it.
"""

from __future__ import annotations

import contextlib
import copyreg
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import fp8gate.casts
from fp8gate.calibrate.arms.linear import LinearArm, Operands, build_linear
from fp8gate.filter.contract.recipes import Casts, Recipe
from fp8gate.filter.contract.shapes import LinearShape

CACHE_TAG = "fp8gate 1"
"""Keeps this package's compile cache apart from training's, whose kernels Inductor's own timing has tuned."""

MAX_ALIVE = 1024
"""How many compiled functions of one module's code may be alive. Each is for another set of its linears in float8, and
a Llama block's seven roles have 128 sets. Dynamo takes more than 8 for a fault."""


@dataclass(frozen=True, slots=True)
class ReadyLinear:
    """A linear of one shape that only lacks its operands; recipe is None for bf16."""

    recipe: Recipe | None
    module: nn.Module
    function: Callable[[Tensor], Tensor]

    def over(self, operands: Operands) -> LinearArm:
        """The arm that computes with these operands; arms over earlier ones are no longer usable."""
        self.module.weight = operands.weight
        return LinearArm(self.recipe, self.function, operands)


def eager_linear(recipe: Recipe | None, shape: LinearShape) -> ReadyLinear:
    """The linear as written, not compiled."""
    weight = nn.Parameter(torch.empty(shape.n, shape.k, device="meta", dtype=torch.bfloat16))
    module = build_linear(recipe, weight)
    return ReadyLinear(recipe, module, module)


def compiled_linear(
    recipe: Recipe | None, shape: LinearShape, inductor: dict[str, bool], device: str, casts: Casts = "inductor"
) -> ReadyLinear:
    """The linear compiled as production does (`dynamic=False`, these Inductor settings), by way of Inductor's cache.

    Guards are left out, as this code only ever runs on operands of `shape`. Raises what the compiler raises.
    """
    linear = eager_linear(recipe, shape)
    x = torch.empty(shape.m, shape.k, device="meta", dtype=torch.bfloat16, requires_grad=True)
    return ReadyLinear(recipe, linear.module, compiled_ahead(linear.module, {"input": x}, inductor, device, casts))


def compiled_ahead(
    module: nn.Module, inputs: Mapping[str, Any], inductor: dict[str, bool], device: str, casts: Casts = "inductor"
) -> Callable[..., Any]:
    """The module as a function that does not compile any more, once its parameters and buffers are real.

    inputs: its keyword arguments. They and the module are on the meta device, and stand for tensors of `device`. casts:
    who compiles the casts to float8, whatever is enabled in this process. Guards are left out, as the code only ever
    runs on tensors of these shapes. Raises what the compiler raises, also at a
    graph break: the code after one could not be compiled ahead.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    backend = _InductorUntilRun()
    with FakeTensorMode(), _settings(inductor, casts):
        put_tensors(module, {name: _empty_like(tensor, device) for name, tensor in tensors_of(module).items()})
        fakes = tree_map_only(Tensor, lambda tensor: _empty_like(tensor, device), inputs)
        options: dict[str, str | int | bool | Callable[..., Any]] = {"guard_filter_fn": _no_guards}
        compiled = torch.compile(module, fullgraph=True, dynamic=False, backend=backend, options=options)
        with contextlib.suppress(_CompiledButNotRun):
            compiled(**fakes)
    backend.may_run = True

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.compiler.set_stance("fail_on_recompile"):
            return compiled(*args, **kwargs)

    return run


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}


def put_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Let the module compute with these parameters and buffers from now on."""
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, tensor)


def _empty_like(tensor: Tensor, device: str) -> Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty.requires_grad_(tensor.requires_grad)


class _CompiledButNotRun(Exception):
    """Everything is compiled; raised where the compiled code would run."""


class _InductorUntilRun:
    """Inductor as a backend, whose code raises instead of running until `may_run`."""

    def __init__(self) -> None:
        self.may_run = False

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: Sequence[Tensor]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        compiled = compile_fx(graph, example_inputs)

        def run(*args: Any) -> Any:
            if not self.may_run:
                raise _CompiledButNotRun
            return compiled(*args)  # type: ignore[operator]

        return run


def _no_guards(guards: Sequence[object]) -> list[bool]:
    return [False] * len(guards)


def _settings(inductor: dict[str, bool], casts: Casts) -> contextlib.ExitStack:
    """These Inductor settings and casts, one thread, errors instead of eager runs.

    The backward is compiled with the forward. Where fp8gate is to cast and knows none of a graph's casts, that is an
    error too: the times would be those of Inductor's casts.
    """
    import torch._dynamo.config
    import torch._functorch.config
    import torch._inductor.config
    import torch.compiler.config

    stack = contextlib.ExitStack()
    stack.enter_context(torch._dynamo.config.patch(fail_on_recompile_limit_hit=True))
    stack.enter_context(torch._dynamo.config.patch(recompile_limit=MAX_ALIVE, accumulated_recompile_limit=MAX_ALIVE))
    stack.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True))
    stack.enter_context(torch._inductor.config.patch({"compile_threads": 1, **inductor}))
    stack.enter_context(fp8gate.casts.replaced(strict=True) if casts == "fp8gate" else fp8gate.casts.not_replaced())
    stack.enter_context(torch.compiler.config.patch(cache_key_tag=CACHE_TAG))  # type: ignore[attr-defined]
    return stack


def _memory_format(name: str) -> torch.memory_format:
    found: torch.memory_format = getattr(torch, name)
    return found


def _reduce_memory_format(
    memory_format: torch.memory_format,
) -> tuple[Callable[[str], torch.memory_format], tuple[str]]:
    return _memory_format, (str(memory_format).removeprefix("torch."),)


copyreg.pickle(torch.memory_format, _reduce_memory_format)
"""Inductor's cache key pickles the graph's memory formats. By default that names the module that imported torch first:
the key would differ between processes, and one would not find what another has compiled."""
