"""torchtitan: a Float8LinearConverter whose filter is fp8gate's, for models divided by tensor parallelism.

torchtitan 0.3 converts configs before it builds modules, and it asks its filter about the configs. The names are those
of the config tree, in which `attention.qkv_linear` has one `wqkv`, or `wq` and a `wkv` that builds both wk and wv. The
sizes are those of the whole model, and `parallel` divides them. In your own config registry, give the converter to
`model_registry`, as `main` does:

    config.model_spec = model_registry(
        "8B", converters=[GatedFloat8Converter.Config(tokens=8192, model_compile_enabled=True)]
    )

    python examples/torchtitan_converter.py --flavor 70B --tp 8
shows what it would convert, and trains nothing. Without a GPU it decides by the tables of an NVIDIA H200.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass, field

from example_options import HAS_GPU, add_table_options, parse
from torchtitan.components.quantization.float8 import Float8Linear, Float8LinearConverter
from torchtitan.models.common.linear import Linear
from torchtitan.models.llama3 import model_registry
from torchtitan.protocols.module import Module

from fp8gate import AutoFilter, Parallel, Recompute, auto_filter

logger = logging.getLogger(__name__)


class GatedFloat8Converter(Float8LinearConverter):
    """Converts the linears that were measured to win."""

    @dataclass(kw_only=True, slots=True)
    class Config(Float8LinearConverter.Config):
        tokens: int
        """Rows of a linear's input on each data parallel rank: training.local_batch_size x seq_len. Under pipeline
        parallelism, the rows of one microbatch."""
        parallel: Parallel = field(default_factory=Parallel)
        """The degrees of the trainer's `parallelism`: Parallel(tp=8, cp=1, plan="torchtitan")."""
        recompute: Recompute = "none"
        """What activation checkpointing runs twice: "full" under FullAC, or a function that takes a layer's name."""
        device: str | None = None
        tables: str | None = None
        strict: bool = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.filter_fn: AutoFilter = auto_filter(
            config.recipe_name,
            tokens=config.tokens,
            filter_fqns=config.filter_fqns,
            parallel=config.parallel,
            recompute=config.recompute,
            device=config.device,
            tables=config.tables,
            strict=config.strict,
        )

    def convert(self, model_config: Module.Config) -> Module.Config:
        self.filter_fn.check([(fqn, linear) for fqn, linear, _, _ in model_config.traverse(Linear.Config)])
        logger.info(self.filter_fn.report())
        return super().convert(model_config)


def main() -> None:
    args = arguments()
    emulate = args.emulate or not HAS_GPU
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    converter = GatedFloat8Converter.Config(
        recipe_name=args.recipe,
        filter_fqns=["lm_head"],  # it runs in chunks of the tokens and is not compiled, which no table measures
        tokens=args.tokens,
        parallel=Parallel(tp=args.tp, cp=args.cp, plan="torchtitan"),
        device=args.device,
        tables=args.tables,
        emulate=emulate,
        model_compile_enabled=not emulate,
    )
    model_config = model_registry(args.flavor, converters=[converter]).model
    linears = list(model_config.traverse(Linear.Config))
    converted = [fqn for fqn, linear, _, _ in linears if isinstance(linear, Float8Linear.Config)]
    print(f"{len(converted)} Float8Linear.Config of {len(linears)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flavor", default="8B")
    parser.add_argument("--recipe", default="rowwise")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--cp", type=int, default=1)
    parser.add_argument("--emulate", action="store_true", help="for a GPU without float8; always without a GPU")
    add_table_options(parser)
    return parse(parser)


if __name__ == "__main__":
    main()
