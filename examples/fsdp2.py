"""Plain FSDP2: every rank decides, the ranks check that they agree, then each converts and shards.

On two GPUs that have been calibrated, with a Llama 3 8B's widths:
    torchrun --nproc-per-node 2 examples/fsdp2.py
FSDP divides what is stored, not what is multiplied. So the filter is asked about each layer at its whole size, and
`tokens` are those of one rank. Without a GPU the example runs on the CPU, over gloo.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from small_llama import Llama
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear

from fp8gate import auto_filter


def main() -> None:
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("fsdp",))
    try:
        with torch.device("meta"):
            model = Llama(dim=args.dim, hidden=args.hidden, layers=args.layers, vocab=args.vocab)
        convert(model, args)  # before sharding, as torchao wants it
        shard(model, mesh)
        model.to_empty(device=device)
        model.init_weights()
        train(model, device, args)
    finally:
        dist.destroy_process_group()


def convert(model: Llama, args: argparse.Namespace) -> None:
    wants_float8 = auto_filter(
        args.recipe,
        tokens=args.batch * args.sequence,  # of one rank
        filter_fqns=["output"],
        device=args.device,
        tables=args.tables,
    )
    wants_float8.check(model)
    wants_float8.agree()  # raises on every rank if any would convert other layers or has another table
    config = Float8LinearConfig.from_recipe_name(args.recipe)
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
        print(f"rank {dist.get_rank()}, step {step}: loss {loss.item():.4f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="rowwise")
    parser.add_argument("--batch", type=int, default=1, help="sequences per rank")
    parser.add_argument("--sequence", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=14336)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", help="whose table to use, such as 'NVIDIA H200'; default: this machine's")
    parser.add_argument("--tables", help="a table, or a folder of tables; default: those that come with fp8gate")
    return parser.parse_args()


if __name__ == "__main__":
    main()
