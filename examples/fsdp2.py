"""Plain FSDP2: every rank decides, the ranks check that they agree, then each converts and shards.

It needs torchrun, with as many processes as there are GPUs:
    torchrun --nproc-per-node=2 examples/fsdp2.py
takes two layers of a Llama 3 8B's widths. Without a GPU the ranks speak over gloo, decide by the tables of an NVIDIA
H200 and train nothing, which takes no memory; see torchao_convert.py for a tiny model that trains on a CPU.
FSDP divides what is stored, not what is multiplied. So the filter is asked about each layer at its whole size, and
`tokens` are those of one rank.
    torchrun --nproc-per-node=2 examples/fsdp2.py --recipe tensorwise --float8-all-gather
casts the weights before FSDP gathers them, which halves what is sent. torchao has this for tensorwise only. No table
was measured so, and the filter says it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys

import torch
import torch.distributed as dist
from example_options import make_parser, parse, say_that_nothing_is_trained
from small_llama import Llama
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torchao.float8 import (
    Float8LinearConfig,
    convert_to_float8_training,
    precompute_float8_dynamic_scale_for_fsdp,
)
from torchao.float8.float8_linear import Float8Linear

from fp8gate import auto_filter


def main() -> None:
    args = arguments()
    if "WORLD_SIZE" not in os.environ:
        sys.exit("fsdp2.py needs torchrun: torchrun --nproc-per-node=2 examples/fsdp2.py")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("fsdp",))
    try:
        with torch.device("meta"):
            model = Llama(dim=args.dim, hidden=args.hidden, layers=args.layers, vocab=args.vocab)
        convert(model, args)  # before sharding, as torchao wants it
        if args.steps:
            shard(model, mesh)
            model.to_empty(device=device)
            model.init_weights()
            train(model, device, args)
        elif dist.get_rank() == 0:
            say_that_nothing_is_trained()
    finally:
        dist.destroy_process_group()


def arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--float8-all-gather", action="store_true", help="gather weights in float8; tensorwise only")
    args = parse(parser)
    if args.float8_all_gather and args.recipe != "tensorwise":
        parser.error("--float8-all-gather needs --recipe tensorwise: torchao has no other")
    return args


def convert(model: Llama, args: argparse.Namespace) -> None:
    recipe_config = Float8LinearConfig.from_recipe_name(args.recipe)
    config = dataclasses.replace(recipe_config, enable_fsdp_float8_all_gather=args.float8_all_gather)
    wants_float8 = auto_filter(
        args.recipe,
        tokens=args.batch * args.sequence,  # of one rank
        filter_fqns=["output"],
        float8_config=config,  # the filter warns of settings that were not measured
        device=args.device,
        tables=args.tables,
    )
    wants_float8.check(model)
    wants_float8.agree()  # raises on every rank if any would convert other layers or has another table
    convert_to_float8_training(model, module_filter_fn=wants_float8, config=config)
    if dist.get_rank() == 0:
        print(wants_float8.report())
        print(f"{sum(isinstance(m, Float8Linear) for m in model.modules())} Float8Linear in the model")


def shard(model: Llama, mesh: DeviceMesh) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def train(model: Llama, device: str, args: argparse.Namespace) -> None:
    if device == "cuda":
        model.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(args.vocab, (args.batch, args.sequence + 1), device=device)
    for step in range(args.steps):
        logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if args.float8_all_gather:
            precompute_float8_dynamic_scale_for_fsdp(model)  # the scales of all weights, by one all-reduce
        print(f"rank {dist.get_rank()}, step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
