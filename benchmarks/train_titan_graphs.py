"""What torchtitan compiles for a layer under tensor parallelism: its products, casts and collectives. Needs no GPU.

One process stands for rank 0 of a group without other ranks, builds torchtitan's own Trainer for one layer of
train_titan.py's models, and stops where the compiled code would run. It counts what the forward's and the backward's
graph hold when Inductor has done its passes over them. *dead*: collectives that the graph runs, and whose result
nothing uses. Attention is the CPU's; all else is as on a GPU.

Run it: python benchmarks/train_titan_graphs.py --widths llama3-8b --tp 2 --choice table
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, get_args
from unittest import mock

import torch
import torch._functorch.config
import torch.distributed
from tabulate import tabulate
from torch import fx
from torch._inductor import compile_fx
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.virtualized import V
from torch.testing._internal.distributed.fake_pg import FakeStore
from train_titan_config import trainer_config
from train_titan_output import CASTS, LABELS, Recompute, Setup, Widths
from train_titan_rank import NoMemoryMonitor

# isort: split
# Not before train_titan_config, which gives torch what torchtitan asks for when it is imported.
from torchtitan.components import metrics
from torchtitan.components.quantization import float8
from torchtitan.distributed import utils as distributed_utils

from fp8gate import casts
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.recipes import require_casts
from fp8gate.filter.locate import find_table

COLLECTIVES = "_c10d_functional."
WAIT = "wait_tensor"
FEW_TOKENS = 1024
COUNTED = (COLLECTIVES, "aten.mm.", "aten._scaled_mm.", "fp8gate.")


class CompiledError(Exception):
    """Raised where compiled code would run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", choices=get_args(Widths), required=True)
    parser.add_argument("--tp", type=int, required=True)
    parser.add_argument("--choice", choices=[choice for choice in LABELS if choice != "plan"], required=True)
    parser.add_argument("--casts", choices=("inductor", "fp8gate"), default="inductor")
    parser.add_argument("--recompute", choices=get_args(Recompute), default="selective")
    parser.add_argument("--recipe", choices=("rowwise", "rowwise_with_gw_hp"), default="rowwise")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--device", default="NVIDIA H100 80GB HBM3", help="whose table decides")
    arguments = parser.parse_args()
    try:
        require_casts(arguments.recipe, arguments.casts)
    except InputError as error:
        parser.error(str(error))
    setup = Setup(
        widths=arguments.widths,
        layers=1,
        tp=arguments.tp,
        fsdp=1,
        recipe=arguments.recipe,
        recompute=arguments.recompute,
        tokens=arguments.tokens,
        steps=5,
        warm_up=0,
        fused=True,
        tables=None,
        plan=None,
    )
    with mock.patch.object(find_table, "local_device_name", return_value=arguments.device):
        graphs = compiled_graphs(setup, arguments.choice, arguments.casts)
    print(report(graphs))


def compiled_graphs(setup: Setup, choice: Any, who_casts: str) -> dict[str, fx.Graph]:
    """The graphs of the layer's forward and backward after Inductor's passes."""
    found: dict[str, fx.Graph] = {}
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(setup.ranks))
    torch.distributed.init_process_group("fake", rank=0, world_size=setup.ranks, store=FakeStore())
    variant = CASTS if who_casts == "fp8gate" else None
    if variant:
        casts.enable()
    compile_one = functools.partial(_compile_with, compile_fx.compile_fx, functools.partial(_note_graph, found))
    patches: list[contextlib.AbstractContextManager[Any]] = [
        mock.patch.object(compile_fx, "compile_fx", compile_one),
        mock.patch.object(torch.distributed, "init_process_group"),  # the Trainer's call, of the group that is there
        mock.patch.object(metrics, "build_device_memory_monitor", NoMemoryMonitor),
        mock.patch.object(distributed_utils, "set_pg_timeouts"),
        mock.patch.object(float8, "has_cuda_capability", return_value=True),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
    ]
    with contextlib.ExitStack() as stack, contextlib.suppress(CompiledError):
        for patch in patches:
            stack.enter_context(patch)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        config = trainer_config(setup, choice, variant=variant, dump_folder=folder, emulate=False)
        config.compile.enable, config.compile.components = True, ["model"]
        model = config.model_spec.model  # neither its embedding nor its head is looked at
        model.vocab_size = model.lm_head.out_features = model.tok_embeddings.num_embeddings = FEW_TOKENS
        config.tokenizer.vocab_size = FEW_TOKENS
        config.build().train()
    return found


def _compile_with(whole: Callable[..., Any], inner: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return whole(*args, **{**options, "inner_compile": inner})


def _note_graph(found: dict[str, fx.Graph], graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
    """In the place of Inductor's compilation of one graph."""
    view_to_reshape(graph)  # type: ignore[no-untyped-call]
    with V.set_fake_mode(torch._guards.detect_fake_mode(inputs)):
        post_grad_passes(graph, False)
    found["backward" if options.get("is_backward") else "forward"] = graph.graph

    def run(_: Any) -> NoReturn:
        raise CompiledError

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def dead_collectives(graph: fx.Graph) -> list[str]:
    """The collectives of which only a wait without users is left."""
    waits = (node for node in graph.nodes if WAIT in str(node.target) and not node.users)
    return [_name(node.all_input_nodes[0]) for node in waits]


def report(graphs: dict[str, fx.Graph]) -> str:
    rows = []
    for which, graph in graphs.items():
        counts = Counter(map(_name, filter(_is_counted, graph.nodes)))
        dead = Counter(dead_collectives(graph))
        rows += [(which, name, count, dead[name] or "") for name, count in sorted(counts.items())]
    return tabulate(rows, headers=("graph", "operation", "count", "dead"), tablefmt="github")


def _is_counted(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target).startswith(COUNTED) and WAIT not in str(node.target)


def _name(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default").rpartition(".")[2].removesuffix("_")


if __name__ == "__main__":
    main()
