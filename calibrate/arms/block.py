"""A block of layers as it is trained: what it computes with, and the same with some of its linears in float8.

In: a model's config, or any module with the inputs it is called with. Out: a `Blueprint`, which every process makes its
own `Block` from, and arms of that which a timer runs. A model's block is its own decoder layer, as `transformers`
builds and calls it, with the sizes that one rank holds. Parameters and what requires a gradient are random, wherever
the block comes from: only time counts.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from fp8gate.calibrate.arms.compilation import compiled_ahead, put_tensors
from fp8gate.calibrate.arms.linear import WEIGHT_STD, convert
from fp8gate.calibrate.device.timer import Results
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.names import block_role
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.model.model_config import ModelConfig, linear_roles
from fp8gate.filter.model.parallel import Parallel, ShardError, Shards

DATA = f"input, grad ~ N(0, 1); weights ~ N(0, {WEIGHT_STD}), of norms 1, biases 0"
LAYER = "model.layers.*."
PIECE = 2**24  # elements
TRUSTED = 0.05  # a result that bf16 itself does not know better, as it is zero but for rounding, is not compared


class BlockError(InputError):
    """A block that cannot be built or measured; the message says what was expected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """A block without its parameters: all that another process needs to build it.

    template: the module, on the meta device. buffers: its buffers, on the CPU. inputs: its keyword arguments, on the
    meta device those that are made anew, which require a gradient, on the CPU the others. shapes: (m, k, n) of each
    role. recomputed: under activation checkpointing. identity: a hash of what it computes, which changes with its code.
    """

    template: nn.Module
    buffers: dict[str, Tensor]
    inputs: Mapping[str, Any]
    shapes: dict[str, LinearShape]
    recomputed: bool
    identity: str

    @classmethod
    def of(cls, module: nn.Module, inputs: Sequence[Any] | Mapping[str, Any], *, recomputed: bool) -> Blueprint:
        """Of any module and the arguments it is called with. Raises BlockError if there is nothing to convert in it."""
        named = dict(inputs) if isinstance(inputs, Mapping) else _by_name(module, inputs)
        return cls._made(module, named, _observed_shapes(module, named), recomputed)

    @classmethod
    def of_layer(
        cls,
        config: ModelConfig,
        facts: Mapping[str, Any],
        *,
        tokens: int,
        sequence: int,
        tp: int = 1,
        recomputed: bool = False,
    ) -> Blueprint:
        """Of a model's decoder layer as one rank of `tp` holds it, called as the model calls it.

        facts: the model's config.json. Raises BlockError if its linears are not those that the filter would see.
        """
        model = _one_layer(_local_facts(config, facts, tp))
        layer = model.layers[0]
        shapes = _layer_shapes(layer, config, tokens, tp)
        hidden = torch.zeros(tokens // sequence, sequence, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        return cls._made(layer, _inputs_of_layer(model, hidden), shapes, recomputed, about=str(model.config))

    @classmethod
    def _made(
        cls,
        module: nn.Module,
        inputs: Mapping[str, Any],
        shapes: dict[str, LinearShape],
        recomputed: bool,
        about: str = "",
    ) -> Blueprint:
        if not shapes:
            raise BlockError("block: expected an nn.Linear in it; found none")
        trained = {name: leaf for name, leaf in _named_leaves(inputs) if leaf.requires_grad}
        if not trained:
            raise BlockError("example_inputs: expected one that requires a gradient, as in training; found none")
        weights = {f"{name}.weight": linear.weight for name, linear in linears_in(module)}
        for name, tensor in {**trained, **weights}.items():
            if tensor.dtype != torch.bfloat16:
                raise BlockError(f"{name}: expected torch.bfloat16, which float8 is compared with; got {tensor.dtype}")
        return cls(
            template=copy.deepcopy(module).to("meta"),
            buffers={name: buffer.cpu() for name, buffer in module.named_buffers()},
            inputs=tree_map_only(Tensor, lambda t: _on_meta(t) if t.requires_grad else t.cpu(), inputs),
            shapes=shapes,
            recomputed=recomputed,
            identity=_identity(module, inputs, about),
        )

    def ready(self, roles: frozenset[str], recipe: Recipe, inductor: dict[str, bool] | None, device: str) -> ReadyBlock:
        """The block with these roles converted, compiled with these settings, or as written for None."""
        module = copy.deepcopy(self.template)
        if roles:
            module = convert(module, recipe, lambda _, fqn: block_role(fqn) in roles)
        whole = Recomputed(module) if self.recomputed else module
        if inductor is None:
            return ReadyBlock(module, whole)
        inputs = tree_map_only(Tensor, _on_meta, self.inputs)
        return ReadyBlock(module, compiled_ahead(whole, inputs, inductor, device))


class Block:
    """A block's random tensors on a device, and what they give in bf16."""

    def __init__(self, blueprint: Blueprint, device: torch.device) -> None:
        template = blueprint.template
        self.tensors: dict[str, Tensor] = {
            **{name: _random_parameter(name, one, device) for name, one in template.named_parameters()},
            **{name: buffer.to(device) for name, buffer in blueprint.buffers.items()},
        }
        self.inputs = tree_map_only(Tensor, lambda tensor: _real(tensor, device), blueprint.inputs)
        inputs = [(name, leaf) for name, leaf in _named_leaves(self.inputs) if leaf.requires_grad]
        self._data = [(leaf, leaf.detach().clone(), _alike(leaf)) for _, leaf in inputs]
        leaves = dict((*inputs, *((name, one) for name, one in self.tensors.items() if one.requires_grad)))
        self._names, self._wanted = ("output", *leaves), tuple(leaves.values())
        self._grad_output = torch.empty(0)
        eager = self.arm(blueprint.ready(frozenset(), "tensorwise", None, device.type))
        output = eager.forward()
        self._grad_output = torch.randn_like(output)
        self._require_all_used(output)
        with self._check_data():
            self._expected = self._reference(eager, 1.0)
            again = self._reference(eager, 3.0)
        self._noise = [_relative_error(one, right) for one, right in zip(again, self._expected, strict=True)]
        for name, right in zip(self._names, self._expected, strict=True):
            if not torch.isfinite(right).all():
                raise BlockError(f"{name}: expected finite values in bf16, with random weights and inputs")
        del eager, output, again
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # of what only this took

    def arm(self, ready: ReadyBlock) -> BlockArm:
        """The arm that computes with these tensors."""
        put_tensors(ready.module, self.tensors)
        return BlockArm(ready.function, self.inputs, self._wanted, self._grad_output)

    def error(self, run: Callable[[], Results]) -> tuple[float, str]:
        """The largest |result - bf16's| / |bf16's| (Frobenius) of all that `run` gives, and whose it is; NaN if not
        finite.

        Of the output, what the block adds to its input counts. For this run all rows of an input are alike by half:
        attention averages over rows, so that of independent ones its output would be too small to tell from nothing.
        """
        with self._check_data():
            results = run()
            found = (self._added(results.output), *results.gradients)
        errors = [
            (_relative_error(one, right), name)
            for name, one, right, noise in zip(self._names, found, self._expected, self._noise, strict=True)
            if noise <= TRUSTED
        ]
        return max(errors, key=lambda error: math.inf if math.isnan(error[0]) else error[0])

    @contextlib.contextmanager
    def _check_data(self) -> Iterator[None]:
        """Inputs of rows that are alike, in the memory of those that are timed."""
        with torch.no_grad():
            for leaf, _, alike in self._data:
                leaf.copy_(alike)
        try:
            yield
        finally:
            with torch.no_grad():
                for leaf, timed, _ in self._data:
                    leaf.copy_(timed)

    def _reference(self, eager: BlockArm, scale: float) -> tuple[Tensor, ...]:
        """The results in bf16. scale: of the gradients on the way, which changes nothing but how they are rounded."""
        output = eager.forward()
        gradients = replace(eager, grad_output=scale * self._grad_output).backward(output)
        return (self._added(output.detach()), *(gradient / scale for gradient in gradients))

    def _added(self, output: Tensor) -> Tensor:
        """The output without the input of its shape that a residual connection has added."""
        return next((output - leaf.detach() for leaf in self._wanted if leaf.shape == output.shape), output)

    def _require_all_used(self, output: Tensor) -> None:
        gradients = torch.autograd.grad(output, self._wanted, self._grad_output, allow_unused=True)
        for name, gradient in zip(self._names[1:], gradients, strict=True):
            if gradient is None:
                raise BlockError(f"{name}: expected the output to depend on it, as it requires a gradient")


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
        return checkpoint(self.block, use_reentrant=False, preserve_rng_state=False, **inputs)


def sequence_of(config: ModelConfig, tokens: int, asked: int | None) -> int:
    """Tokens of one sequence: as asked, else as many as the model takes. Raises BlockError if they do not divide."""
    sequence = asked or min(tokens, config.max_position_embeddings or tokens)
    if tokens % sequence:
        raise BlockError(f"sequence: expected a divisor of tokens = {tokens}; got {sequence}")
    return sequence


def _one_layer(facts: Mapping[str, Any]) -> Any:
    """The model with a single layer and a vocabulary of one token, on the meta device but for the positions."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(**facts)
    with torch.device("meta"):
        build: Callable[..., Any] = AutoModel.from_config
        model = build(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    model.rotary_emb = type(model.rotary_emb)(config=config)
    return model


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
    one_layer = {"num_hidden_layers": 1, "vocab_size": 1, "head_dim": config.size_of_head}
    no_tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    without = ("layer_types", "quantization_config", "architectures")
    return {**{name: fact for name, fact in facts.items() if name not in without}, **local, **one_layer, **no_tokens}


def _layer_shapes(layer: nn.Module, config: ModelConfig, tokens: int, tp: int) -> dict[str, LinearShape]:
    """Those of the layer's linears, which must be what `filter.models` and `filter.parallel` say."""
    shards = Shards(Parallel(tp=tp, plan="transformers"), tokens)
    try:
        expected = {
            linear.fqn.removeprefix(LAYER): shards.local_shape(linear.fqn, linear.in_features, linear.out_features)
            for linear in linear_roles(config)
            if linear.fqn.startswith(LAYER)
        }
    except ShardError as error:
        raise BlockError(f"tp: {error}") from error
    found = {name: LinearShape(tokens, linear.in_features, linear.out_features) for name, linear in linears_in(layer)}
    if found != expected:
        differ = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        name = differ[0]
        raise BlockError(f"{name}: expected {expected.get(name)} in the decoder layer, found {found.get(name)}")
    return found


def _random_parameter(name: str, like: Tensor, device: torch.device) -> nn.Parameter:
    parameter = nn.Parameter(_empty(like, device), requires_grad=like.requires_grad)
    with torch.no_grad():
        if parameter.ndim > 1:
            parameter.normal_(std=WEIGHT_STD)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return parameter


def _real(tensor: Tensor, device: torch.device) -> Tensor:
    """An input that requires a gradient is made anew, another taken over."""
    if not tensor.is_meta:
        return tensor.to(device)
    return _empty(tensor, device).normal_().requires_grad_()


def _alike(leaf: Tensor) -> Tensor:
    """As large as N(0, 1): half of what varies is the same in all rows."""
    own, common = torch.randn_like(leaf), torch.randn(leaf.shape[-1:], dtype=leaf.dtype, device=leaf.device)
    return (own.detach() + common) / math.sqrt(2)


def _relative_error(result: Tensor, right: Tensor) -> float:
    """NaN if not finite. A piece at a time: experts' gradients are gigabytes, and twice that in float32."""
    pieces = zip(torch.split(result.flatten(), PIECE), torch.split(right.flatten(), PIECE), strict=True)
    squares = torch.zeros(2, dtype=torch.float64, device=result.device)
    for one, other in pieces:
        other = other.float()
        squares += torch.stack([(one.float() - other).square().sum(), other.square().sum()])
    error, size = squares.sqrt()
    return float(error / size) if torch.isfinite(error) else math.nan


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


def _observed_shapes(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, LinearShape]:
    """Run it once and note the shape that each role multiplies. Raises BlockError if a role has several."""
    shapes: dict[str, set[LinearShape]] = {}

    def note(role: str) -> Callable[[nn.Linear, tuple[Any, ...]], None]:
        def hook(linear: nn.Linear, args: tuple[Any, ...]) -> None:
            m = math.prod(args[0].shape[:-1])
            shapes.setdefault(role, set()).add(LinearShape(m, linear.in_features, linear.out_features))

        return hook

    hooks = [linear.register_forward_pre_hook(note(block_role(name))) for name, linear in linears_in(module)]
    try:
        with torch.no_grad():
            module(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for role, found in shapes.items():
        if len(found) > 1:
            raise BlockError(f"{role}: expected linears of one shape, found {', '.join(map(str, sorted(found)))}")
    return {block_role(name): shape for name, _ in linears_in(module) for shape in shapes.get(block_role(name), ())}


def _identity(module: nn.Module, inputs: Mapping[str, Any], about: str) -> str:
    """Of the modules, their code and settings, and the inputs."""
    code = sorted({_source(type(one)) for one in module.modules()})
    called = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in _named_leaves(inputs)}
    return hashlib.sha256(f"{module} {code} {called} {about}".encode()).hexdigest()[:16]


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # written at a prompt, or in C
        return kind.__qualname__


def _named_leaves(inputs: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """The tensors in a block's arguments, by the argument they are in, and their place in it if there are several."""
    named = []
    for name, value in inputs.items():
        leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        named += [(name if len(leaves) == 1 else f"{name}[{i}]", leaf) for i, leaf in enumerate(leaves)]
    return named


def linears_in(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, inner) for name, inner in module.named_modules() if isinstance(inner, nn.Linear))


def _by_name(module: nn.Module, args: Sequence[Any]) -> dict[str, Any]:
    return dict(inspect.signature(module.forward).bind_partial(*args).arguments)


def _tensor(output: Any) -> Tensor:
    """What a block returns, or the first of several things. Raises BlockError if that is no tensor."""
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor):
        raise BlockError(
            f"block: expected a tensor, or a tuple that begins with one; it returns {type(first).__name__}"
        )
    return first


def _on_meta(tensor: Tensor) -> Tensor:
    return _empty(tensor, torch.device("meta")).requires_grad_(tensor.requires_grad)


def _empty(like: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)


def bundled_facts(config: ModelConfig) -> dict[str, Any]:
    """A bundled model's config, as far as it is known here."""
    return {name: fact for name, fact in msgspec.structs.asdict(config).items() if fact is not None}
