"""torchao: ask about a model before it has weights, convert it, train two steps.

    python examples/torchao_convert.py
takes two layers of a Llama 3 8B's widths. Without a GPU it decides by the tables of an NVIDIA H200 and trains nothing,
which takes no memory. A tiny model trains on a CPU too, by a table that has its sizes:
    python examples/torchao_convert.py --dim 64 --hidden 256 --vocab 512 --sequence 64 --steps 2 --tables TABLE
"""

from __future__ import annotations

import argparse

import torch
from example_options import make_parser, parse, say_that_nothing_is_trained
from small_llama import Llama
from torch.nn import functional as F
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear

from fp8gate import auto_filter


def main() -> None:
    args = parse(make_parser(__doc__))
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
    else:
        say_that_nothing_is_trained()


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


if __name__ == "__main__":
    main()
