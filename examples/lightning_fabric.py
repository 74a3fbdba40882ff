"""Lightning Fabric: convert the model, then hand it to `Fabric.setup`; under torchrun, Fabric divides it by FSDP2.

    python examples/lightning_fabric.py
    torchrun --nproc-per-node=2 examples/lightning_fabric.py
take two layers of a Llama 3 8B's widths. Without a GPU they decide by the tables of an NVIDIA H200 and train nothing,
which takes no memory; see torchao_convert.py for a tiny model that trains on a CPU. Fabric has no precision of
its own for torchao's float8, and needs none: under "bf16-true" all else is bf16, as it was measured.
"""

from __future__ import annotations

import argparse
import os

import torch
from example_options import HAS_GPU, make_parser, parse, say_that_nothing_is_trained
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from small_llama import Llama
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear

from fp8gate import auto_filter

RANKS = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun sets it


def main() -> None:
    args = parse(make_parser(__doc__))
    strategy = ModelParallelStrategy(shard, data_parallel_size=RANKS, tensor_parallel_size=1) if RANKS > 1 else "auto"
    fabric = Fabric(accelerator="cuda" if HAS_GPU else "cpu", devices=RANKS, strategy=strategy, precision="bf16-true")
    fabric.launch()
    with torch.device("meta"):
        model = Llama(dim=args.dim, hidden=args.hidden, layers=args.layers, vocab=args.vocab)
    convert(model, fabric, args)  # before sharding, as torchao wants it
    if args.steps:
        train(model, fabric, args)
    elif fabric.is_global_zero:
        say_that_nothing_is_trained()


def convert(model: Llama, fabric: Fabric, args: argparse.Namespace) -> None:
    wants_float8 = auto_filter(
        args.recipe,
        tokens=args.batch * args.sequence,  # of one rank
        filter_fqns=["output"],
        device=args.device,
        tables=args.tables,
    )
    wants_float8.check(model)
    if RANKS > 1:
        wants_float8.agree()  # raises on every rank if any would convert other layers or has another table
    config = Float8LinearConfig.from_recipe_name(args.recipe)
    convert_to_float8_training(model, module_filter_fn=wants_float8, config=config)
    fabric.print(wants_float8.report())
    fabric.print(f"{sum(isinstance(m, Float8Linear) for m in model.modules())} Float8Linear in the model")


def shard(model: Llama, mesh: DeviceMesh) -> Llama:
    for block in model.layers:
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


def train(model: Llama, fabric: Fabric, args: argparse.Namespace) -> None:
    fabric_model = fabric.setup_module(model, move_to_device=False)  # it has no data yet
    model.to_empty(device=fabric.device)
    model.init_weights()
    if HAS_GPU:
        model.compile(dynamic=False)  # the casts are fast only where they are compiled
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(fabric_model.parameters(), lr=1e-3))
    ids = torch.randint(args.vocab, (args.batch, args.sequence + 1), device=fabric.device)
    for step in range(args.steps):
        logits = fabric_model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        print(f"rank {fabric.global_rank}, step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
