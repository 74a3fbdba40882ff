"""The options that the examples share, and what they do where there is no GPU: decide, and train nothing large."""

from __future__ import annotations

import argparse

import torch

HAS_GPU = torch.cuda.is_available()
MEASURED = "NVIDIA H200"  # its tables come with fp8gate
BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two moments in float32
MAX_CPU_GIB = 2.0  # of a laptop, beside all else that runs there


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """The sizes are those of two layers of a Llama 3 8B, and the tokens those of one sequence of it."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="rowwise")
    parser.add_argument("--batch", type=int, default=1, help="sequences per rank and step; default: %(default)s")
    parser.add_argument("--sequence", type=int, default=8192, help="default: %(default)s")
    parser.add_argument("--dim", type=int, default=4096, help="default: %(default)s")
    parser.add_argument("--hidden", type=int, default=14336, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--vocab", type=int, default=128256, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=2 if HAS_GPU else 0, help="to train; default: 2, without a GPU 0")
    add_table_options(parser)
    return parser


def add_table_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help=f"whose table to use; default: this GPU's, without a GPU the {MEASURED}'s")
    parser.add_argument("--tables", help="a table, or a folder of tables; default: those that fp8gate finds")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Without a GPU: decide by a measured GPU's table, and refuse to train what a laptop has no memory for."""
    args = parser.parse_args()
    if not HAS_GPU and args.device is None and args.tables is None:
        args.device = MEASURED
    if not HAS_GPU and getattr(args, "steps", 0):
        gib = parameters(args) * BYTES_PER_PARAMETER / 2**30
        if gib > MAX_CPU_GIB:
            parser.error(
                f"there is no GPU here, and training this model would take {gib:.0f} GiB; give a tiny one: "
                "--dim 64 --hidden 256 --vocab 512 --sequence 64 --tables TABLE"
            )
    return args


def parameters(args: argparse.Namespace) -> int:
    """Of the model that the sizes describe, at most: with as many heads for keys as for queries."""
    layer = 4 * args.dim**2 + 3 * args.dim * args.hidden
    return args.layers * layer + 2 * args.vocab * args.dim


def say_that_nothing_is_trained() -> None:
    print("trained nothing: there is no GPU here (--steps trains on the CPU)" if not HAS_GPU else "trained nothing")
