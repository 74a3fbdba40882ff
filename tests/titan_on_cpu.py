"""Runs torchtitan's own Trainer for a few steps on the CPU, which it does not support: a script for the tests.

    python titan_on_cpu.py STEPS --module llama3 --config llama3_debugmodel --override.imports ...

It gives the Trainer what needs a GPU (a device, attention, a memory monitor), and random tokens for a data set. It
prints the loss of each step, and how many modules are Float8Linear.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._utils

torch._utils._get_available_device_type = lambda: "cpu"  # torchtitan asks on import

from torchtitan.components import metrics
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.quantization.float8 import Float8Linear
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import ConfigManager
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.tools.logging import init_logger

ROOT = Path(__file__).parent.parent
VOCAB = 2048


class Tokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, *, tokenizer_path: str) -> None:
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        return []

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return ""

    def get_vocab_size(self) -> int:
        return VOCAB


class Tokens(BaseDataLoader):
    """The same random tokens in every step, so that the loss falls."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Config, *, seq_len: int, local_batch_size: int, **rest: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, VOCAB, (local_batch_size, seq_len), generator=generator)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            yield {"input": self.tokens.clone()}, self.tokens.clone()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def main(steps: int, command: list[str]) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from train_titan_rank import NoMemoryMonitor

    init_logger()
    metrics.build_device_memory_monitor = NoMemoryMonitor
    config: Any = ConfigManager().parse_args(command)
    config.tokenizer, config.dataloader = Tokenizer.Config(), Tokens.Config()
    for layer in config.model_spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    trainer = config.build()
    batches = trainer.batch_generator(trainer.dataloader)
    for _ in range(steps):
        trainer.step += 1
        trainer.train_step(batches)
    modules = list(trainer.model_parts[0].modules())
    print(f"{sum(isinstance(module, Float8Linear) for module in modules)} Float8Linear", flush=True)
    trainer.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
