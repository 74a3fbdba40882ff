"""The configs of torchtitan's Trainer that benchmarks/train_titan.py compares, and the tokens that it trains on.

They are what torchtitan's own functions make, with fewer layers. The attention is torchtitan's
ScaledDotProductAttention: each sequence is one document. The loss is torchtitan's CrossEntropyLoss over all tokens at
once, because its ChunkedLossWrapper does not run with torch 2.11 (the backward of a chunk finds the head's weight
freed). The weights of all choices start from the same seed. Tensors are divided as DTensors ("partial_dtensor"): under
tensor parallelism torchtitan's default, "spmd_types", needs a torch newer than 2.13.

Without a GPU, float8 is emulated and nothing is compiled, which shows that all choices train, and no speeds.

In: a Setup and a choice. Out: a Trainer.Config, which train_titan_rank.py builds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch._utils
import torch.distributed.fsdp
from train_titan_output import CASTS, LOG_EVERY, Choice, Setup, Variant

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    torch._utils._get_available_device_type = lambda: "cpu"  # torchtitan asks when it is imported
# torch 2.11 lacks this class, which torchtitan imports. Nothing makes an object of it under "partial_dtensor".
vars(torch.distributed.fsdp).setdefault("DataParallelMeshDims", type("DataParallelMeshDims", (), {}))

from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.quantization import Float8LinearConverter
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import (
    CompileConfig,
    DebugConfig,
    OverrideConfig,
    ParallelismConfig,
    TrainingConfig,
)
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.config_utils import make_gqa_config
from torchtitan.models.common.linear import Linear
from torchtitan.models.llama3 import model_registry
from torchtitan.tools.profiler import Profiler
from torchtitan.trainer import Trainer

from fp8gate.filter.decision.torchao_rule import torchao_converts
from fp8gate.filter.model.parallel import Parallel, Shards

FLAVORS = {"llama3-8b": "8B", "llama3-70b": "70B", "tiny": "debugmodel"}
HEAD = "lm_head"
PEAK_LEARNING_RATE, LR_WARM_UP_STEPS, SEED = 1e-4, 10, 0


class Tokenizer(BaseTokenizer):  # type: ignore[misc]
    """The Trainer wants one. No text is encoded: it only says how many tokens there are."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):  # type: ignore[misc]
        vocab_size: int

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size

    def encode(self, *_: Any, **__: Any) -> list[int]:
        raise NotImplementedError

    def decode(self, *_: Any, **__: Any) -> str:
        raise NotImplementedError

    def get_vocab_size(self) -> int:
        return self.vocab_size


class Tokens(BaseDataLoader):  # type: ignore[misc]
    """New tokens in every step, the same ones for every choice.

    Every second token is drawn by Zipf's law, and the next one follows from it, so that there is something to learn.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):  # type: ignore[misc]
        pass

    def __init__(
        self, config: Config, *, dp_rank: int, tokenizer: Tokenizer, seq_len: int, local_batch_size: int, **_: Any
    ) -> None:
        self.vocab = tokenizer.get_vocab_size()
        self.shape = (local_batch_size, seq_len // 2 + 1)
        self.successors = zipf((self.vocab,), self.vocab, torch.Generator().manual_seed(SEED))
        self.generator = torch.Generator().manual_seed(SEED + 1 + dp_rank)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            drawn = zipf(self.shape, self.vocab, self.generator)
            ids = torch.stack([drawn, self.successors[drawn]], dim=-1).flatten(1)
            yield {"input": ids[:, :-2].clone()}, ids[:, 1:-1].clone()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def zipf(shape: tuple[int, ...], vocab: int, rng: torch.Generator) -> torch.Tensor:
    """Tokens by Zipf's law: token i is drawn about as often as 1 / (i + 1)."""
    return ((vocab + 1) ** torch.rand(shape, generator=rng, dtype=torch.float64)).long() - 1


def trainer_config(
    setup: Setup,
    choice: Choice,
    *,
    variant: Variant | None = None,
    traced_steps: int = 0,
    dump_folder: str = "",
    emulate: bool = not ON_GPU,
) -> Any:
    """The config of a run, in which torchtitan's converter has converted, or fp8gate's override will.

    emulate: float8 by other types. traced_steps: so many of the last steps are traced by torchtitan's profiler, into
    the dump folder.
    """
    spec = model_spec(setup)
    imports = []
    if choice in ("table", "plan"):
        imports.append(("fp8gate.torchtitan.gate", gate_settings(setup, choice, variant, emulate=emulate)))
    elif choice != "bf16":
        left = (
            [HEAD] if choice == "all" else [HEAD, *left_by_rule(setup, spec.model, of_shards=choice == "rule-shards")]
        )
        converter = Float8LinearConverter.Config(
            recipe_name=setup.recipe, filter_fqns=left, emulate=emulate, model_compile_enabled=not emulate
        )
        spec.model = converter.build().convert(spec.model)
    return Trainer.Config(
        dump_folder=dump_folder,
        model_spec=spec,
        loss=CrossEntropyLoss.Config(global_vocab_size=spec.model.vocab_size),
        tokenizer=Tokenizer.Config(vocab_size=spec.model.vocab_size),
        dataloader=Tokens.Config(),
        optimizer=default_adamw(lr=PEAK_LEARNING_RATE),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=LR_WARM_UP_STEPS),
        training=TrainingConfig(
            local_batch_size=1,
            seq_len=setup.tokens,
            steps=setup.steps,
            disable_cuda_graphs=variant == "without CUDA graphs" or not ON_GPU,
        ),
        parallelism=ParallelismConfig(
            tensor_parallel_degree=setup.tp, data_parallel_shard_degree=setup.fsdp, spmd_backend="partial_dtensor"
        ),
        activation_checkpoint={"none": None, "selective": SelectiveAC.Config(), "full": FullAC.Config()}[
            setup.recompute
        ],
        compile=CompileConfig(enable=ON_GPU, enable_async_tensor_parallel=variant == "async TP"),
        profiler=Profiler.Config(
            enable_profiling=traced_steps > 0, profile_freq=setup.steps, profiler_active=max(traced_steps, 1)
        ),
        metrics=MetricsProcessor.Config(log_freq=LOG_EVERY, disable_color_printing=True),
        debug=DebugConfig(seed=SEED, enable_structured_logging=False),
        override=OverrideConfig(imports=imports),
    )


def model_spec(setup: Setup) -> Any:
    """torchtitan's own model of these widths, with fewer layers."""
    spec = model_registry(FLAVORS[setup.widths])
    spec.model.layers = spec.model.layers[: setup.layers]
    for layer in spec.model.layers:
        if not setup.fused:
            layer.attention = apart(layer.attention, layer.feed_forward.w1.param_init)
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return spec


def apart(attention: Any, param_init: Any) -> Any:
    """The same attention with a linear for q, and one each for k and v."""
    return make_gqa_config(
        dim=attention.dim,
        n_heads=attention.n_heads,
        n_kv_heads=attention.n_kv_heads,
        wqkv_param_init=param_init,
        wo_param_init=attention.wo.param_init,
        inner_attention=attention.inner_attention,
        rope=attention.rope,
        fuse_qkv=False,
    )


def gate_settings(setup: Setup, choice: Choice, variant: Variant | None, *, emulate: bool) -> dict[str, Any]:
    given = {"tables": setup.tables, "plan": setup.plan if choice == "plan" else None}
    given["casts"] = "fp8gate" if variant == CASTS else "inductor"
    return {"recipe": setup.recipe, "emulate": emulate, **given}


def left_by_rule(setup: Setup, model: Any, *, of_shards: bool) -> list[str]:
    """The linears that torchao's rule leaves in bf16.

    torchtitan's switch for the rule, auto_filter_small_kn, converts nothing in 0.3.0. The releases before asked torchao
    about the model before it was divided, so that the rule saw whole linears. The rule's numbers are of products that
    one GPU computes, which a rank's shards are.
    """
    shards = Shards(Parallel(tp=setup.tp if of_shards else 1, plan="torchtitan"), tokens=setup.tokens)
    left = []
    for fqn, linear, *_ in model.traverse(Linear.Config):
        shape = shards.local_shape(fqn, linear.in_features, linear.out_features)
        if not torchao_converts(setup.recipe, in_features=shape.k, out_features=shape.n):
            left.append(fqn)
    return left
