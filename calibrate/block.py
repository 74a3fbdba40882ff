"""A block of layers as it is trained: what it computes with, and the same with some of its linears in float8.

In: a model's config, or any module with the inputs it is called with. Out: a `Block`, and arms of it that a timer runs.
A model's block is its own decoder layer, as `transformers` builds and calls it, with the sizes that one rank holds; no
other part of the model is ever made but an embedding of one row and a norm.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from fp8gate.calibrate.compilation import compiled_ahead, put_tensors, tensors_of
from fp8gate.calibrate.linears import WEIGHT_STD, convert
from fp8gate.filter.models import ModelConfig, linear_roles
from fp8gate.filter.parallel import Parallel, ShardError, Shards
from fp8gate.filter.plan import block_role
from fp8gate.filter.shapes import LinearShape
from fp8gate.filter.table import Recipe

DATA = f"input, grad ~ N(0, 1); weights ~ N(0, {WEIGHT_STD}), of norms 1, biases 0"
LAYER = "model.layers.*."


class BlockError(ValueError):
    """A block that cannot be built or measured; the message says what was expected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A module and its inputs. template: the module without its tensors, on the meta device. tensors: its parameters
    and buffers by name. inputs: its keyword arguments. recomputed: under activation checkpointing. shapes: (m, k, n) of
    each role. grad_output: the gradient of what it returns."""

    template: nn.Module
    tensors: dict[str, Tensor]
    inputs: Mapping[str, Any]
    recomputed: bool
    shapes: dict[str, LinearShape]
    grad_output: Tensor

    @classmethod
    def of(cls, module: nn.Module, inputs: Sequence[Any] | Mapping[str, Any], *, recomputed: bool = False) -> Block:
        """Raises BlockError if there is nothing to convert or to time in it."""
        named = inputs if isinstance(inputs, Mapping) else _by_name(module, inputs)
        shapes, output = _observe(module, named)
        if not shapes:
            raise BlockError("block: expected an nn.Linear in it; found none")
        if not any(tensor.requires_grad for tensor in tree_leaves(named) if isinstance(tensor, Tensor)):
            raise BlockError("example_inputs: expected one that requires a gradient, as in training; found none")
        return cls(
            template=copy.deepcopy(module).to("meta"),
            tensors=tensors_of(module),
            inputs=named,
            recomputed=recomputed,
            shapes=shapes,
            grad_output=torch.randn_like(output),
        )

    @property
    def device(self) -> torch.device:
        return self.grad_output.device

    def blueprint(self) -> Blueprint:
        """What another process needs to compile it."""
        inputs = tree_map_only(Tensor, _on_meta, self.inputs)
        return Blueprint(template=self.template, inputs=inputs, recomputed=self.recomputed, device=self.device.type)

    def arm(self, ready: ReadyBlock) -> BlockArm:
        """The arm that computes with this block's tensors."""
        put_tensors(ready.module, self.tensors)
        leaves = [leaf for leaf in (*tree_leaves(self.inputs), *self.tensors.values()) if isinstance(leaf, Tensor)]
        wanted = tuple(dict.fromkeys(leaf for leaf in leaves if leaf.requires_grad))
        return BlockArm(ready.function, self.inputs, wanted, self.grad_output)


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """A block without tensors: all that compiling needs, on the meta device."""

    template: nn.Module
    inputs: Mapping[str, Any]
    recomputed: bool
    device: str

    def ready(self, roles: frozenset[str], recipe: Recipe, inductor: dict[str, bool] | None) -> ReadyBlock:
        """The block with these roles converted, compiled with these settings, or as written for None."""
        module = copy.deepcopy(self.template)
        if roles:
            module = convert(module, recipe, lambda _, fqn: block_role(fqn) in roles)
        whole = Recomputed(module) if self.recomputed else module
        function = whole if inductor is None else compiled_ahead(whole, self.inputs, inductor, self.device)
        return ReadyBlock(module, function)


@dataclass(frozen=True, slots=True)
class ReadyBlock:
    """A block that only lacks its tensors."""

    module: nn.Module
    function: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class BlockArm:
    """One way to compute a block. wanted: the inputs and parameters whose gradients training needs."""

    function: Callable[..., Any]
    inputs: Mapping[str, Any]
    wanted: tuple[Tensor, ...]
    grad_output: Tensor

    def forward(self) -> Tensor:
        return _tensor(self.function(**self.inputs))

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        """Not `.backward()`, which would add accumulation kernels."""
        return torch.autograd.grad(output, self.wanted, self.grad_output)


class Recomputed(nn.Module):
    """A block under activation checkpointing: its forward runs again before its backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, **inputs: Any) -> Any:
        return checkpoint(self.block, use_reentrant=False, **inputs)


def decoder_layer(
    config: ModelConfig, facts: Mapping[str, Any], *, tokens: int, sequence: int, tp: int, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """A model's decoder layer as one rank of `tp` holds it, with random weights, and what the model calls it with.

    facts: the model's config.json. Raises BlockError if its linears are not those that the filter would see.
    """
    model = _one_layer(_local_facts(config, facts, tp), device)
    layer = model.layers[0]
    _require_shapes(layer, config, tokens, tp)
    _randomize(layer)
    hidden = torch.randn(tokens // sequence, sequence, config.hidden_size, device=device, dtype=torch.bfloat16)
    return layer, _inputs_of_layer(model, hidden.requires_grad_())


def sequence_of(config: ModelConfig, tokens: int, asked: int | None) -> int:
    """Tokens of one sequence: as asked, else as many as the model takes. Raises BlockError if they do not divide."""
    sequence = asked or min(tokens, config.max_position_embeddings or tokens)
    if tokens % sequence:
        raise BlockError(f"sequence: expected a divisor of tokens = {tokens}; got {sequence}")
    return sequence


def _one_layer(facts: Mapping[str, Any], device: torch.device) -> Any:
    """The model with a single layer and a vocabulary of one token, uninitialized."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(**facts)
    with torch.device(device):
        return AutoModel.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)


def _local_facts(config: ModelConfig, facts: Mapping[str, Any], tp: int) -> dict[str, Any]:
    sizes = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads or config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
    }
    for name, size in sizes.items():
        if size % tp:
            raise BlockError(f"tp: expected a divisor of {name} = {size}; got {tp}")
    local = {name: size // tp for name, size in sizes.items()}
    one_layer = {"num_hidden_layers": 1, "vocab_size": 1, "head_dim": config.size_of_head, "pad_token_id": None}
    without = ("layer_types", "quantization_config", "architectures")
    return {**{name: fact for name, fact in facts.items() if name not in without}, **local, **one_layer}


def _require_shapes(layer: nn.Module, config: ModelConfig, tokens: int, tp: int) -> None:
    """The layer's linears are those of `filter.models`, divided as `filter.parallel` says."""
    shards = Shards(Parallel(tp=tp, plan="transformers"), tokens)
    try:
        expected = {
            linear.fqn.removeprefix(LAYER): shards.local_shape(linear.fqn, linear.in_features, linear.out_features)
            for linear in linear_roles(config)
            if linear.fqn.startswith(LAYER)
        }
    except ShardError as error:
        raise BlockError(f"tp: {error}") from error
    found = {name: LinearShape(tokens, linear.in_features, linear.out_features) for name, linear in _linears(layer)}
    if found != expected:
        differ = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        name = differ[0]
        raise BlockError(f"{name}: expected {expected.get(name)} in the decoder layer, found {found.get(name)}")


def _randomize(layer: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=WEIGHT_STD)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


class _Called(Exception):
    """The layer was called, with what it was called with."""


def _inputs_of_layer(model: Any, hidden: Tensor) -> dict[str, Any]:
    """What the model itself calls its first layer with: positions, a mask if it needs one, no cache."""

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Called({**_by_name(model.layers[0], args), **kwargs})

    hook = model.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(inputs_embeds=hidden, use_cache=False)
    except _Called as called:
        inputs: dict[str, Any] = called.args[0]
    else:
        raise BlockError("model: expected its layers to be called; they were not")
    finally:
        hook.remove()
    return {name: value for name, value in inputs.items() if value is not None}


def _observe(module: nn.Module, inputs: Mapping[str, Any]) -> tuple[dict[str, LinearShape], Tensor]:
    """Run it once: the shape that each role multiplies, and the output. Raises BlockError if a role has several."""
    shapes: dict[str, set[LinearShape]] = {}

    def note(role: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(linear: nn.Module, args: tuple[Any, ...]) -> None:
            k, n = linear.in_features, linear.out_features
            shapes.setdefault(role, set()).add(LinearShape(math.prod(args[0].shape[:-1]), k, n))  # type: ignore[arg-type]

        return hook

    hooks = [linear.register_forward_pre_hook(note(block_role(name))) for name, linear in _linears(module)]
    try:
        with torch.no_grad():
            output = _tensor(module(**inputs))
    finally:
        for hook in hooks:
            hook.remove()
    for role, found in shapes.items():
        if len(found) > 1:
            raise BlockError(f"{role}: expected linears of one shape, found {', '.join(map(str, sorted(found)))}")
    order = dict.fromkeys(block_role(name) for name, _ in _linears(module))
    return {role: shape for role in order for shape in shapes.get(role, ())}, output


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, inner) for name, inner in module.named_modules() if isinstance(inner, nn.Linear))


def _by_name(module: nn.Module, args: Sequence[Any]) -> dict[str, Any]:
    return dict(inspect.signature(module.forward).bind_partial(*args).arguments)


def _tensor(output: Any) -> Tensor:
    """What a block returns, or the first of several things. Raises BlockError if that is no tensor."""
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor):
        raise BlockError(f"block: expected a tensor, or a tuple that begins with one; it returns {type(first).__name__}")
    return first


def _on_meta(tensor: Tensor) -> Tensor:
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return meta.requires_grad_(tensor.requires_grad)


def bundled_facts(config: ModelConfig) -> dict[str, Any]:
    """A bundled model's config, as far as it is known here."""
    return {name: fact for name, fact in msgspec.structs.asdict(config).items() if fact is not None}
