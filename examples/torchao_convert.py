"""torchao: ask about a model before it has weights, convert it, train a step.

On a GPU that has been calibrated, with a Llama 3 8B's widths:
    python examples/torchao_convert.py
Convert by the table of another device, without training:
    python examples/torchao_convert.py --device "NVIDIA H200" --steps 0
"""

from __future__ import annotations

import argparse

import torch
from small_llama import Llama
from torch.nn import functional as F
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear

from fp8gate import auto_filter


def main() -> None:
    args = arguments()
    with torch.device("meta"):
        model = Llama(dim=args.dim, hidden=args.hidden, layers=args.layers, vocab=args.vocab).to(torch.bfloat16)

    wants_float8 = auto_filter(
        args.recipe,
        tokens=args.batch * args.sequence,  # rows of a linear's input, per rank and microbatch
        filter_fqns=["output"],
        device=args.device,
        tables=args.tables,
    )
    wants_float8.check(model)  # warns, for example, of a stale table; strict=True raises an error instead
    config = Float8LinearConfig.from_recipe_name(args.recipe)
    convert_to_float8_training(model, module_filter_fn=wants_float8, config=config)
    print(wants_float8.report())
    print(f"{sum(isinstance(m, Float8Linear) for m in model.modules())} Float8Linear in the model")
    if args.steps:
        train(model, args)


def train(model: Llama, args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to_empty(device=device)
    model.init_weights()
    if device == "cuda":
        model.compile(dynamic=False)  # the casts are fast only where they are compiled
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(args.vocab, (args.batch, args.sequence + 1), device=device)
    for step in range(args.steps):
        logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="rowwise")
    parser.add_argument("--batch", type=int, default=1)
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
