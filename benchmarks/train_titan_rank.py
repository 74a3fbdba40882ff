"""What each rank of benchmarks/train_titan.py runs: torchtitan's own Trainer, for one visit to one choice.

Run it: benchmarks/train_titan.py does, under torchrun. With --list, which trains nothing, it takes one process.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import torch
from torch.distributed.fsdp import FSDPModule
from train_titan_config import HEAD, ON_GPU, model_spec, trainer_config
from train_titan_output import CASTS, LABELS, Choice, Setup, Variant, choices_with
from train_titan_trace import read_trace

TRACED_STEPS = 2
LOGGER = logging.getLogger("train_titan")

# Not before train_titan_config, which gives torch what torchtitan asks for when it is imported.
from torchtitan.components import metrics
from torchtitan.components.quantization.float8 import Float8Linear
from torchtitan.config import apply_overrides
from torchtitan.distributed import utils as distributed_utils
from torchtitan.models.common.linear import Linear
from torchtitan.tools.logging import init_logger

from fp8gate import TableError, casts
from fp8gate.calibrate.device.registry import choose_device, describe_device, describe_software, kind_of
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.decision.torchao_rule import torchao_converts


class NoMemoryMonitor:
    """In place of torchtitan's, which reads a GPU's memory."""

    device_name = "cpu"

    def get_peak_stats(self) -> Any:
        return metrics.DeviceMemStats(0, 0, 0, 0, 0, 0)

    def reset_peak_stats(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setup", help="a Setup of train_titan_output.py, as JSON")
    parser.add_argument("--choice", choices=LABELS, default="bf16")
    parser.add_argument("--variant", choices=get_args(Variant))
    parser.add_argument(
        "--trace", type=Path, help=f"trace the last {TRACED_STEPS} steps, and write into this file what ran"
    )
    parser.add_argument("--list", type=Path, help="only write into this file what each choice would convert, and where")
    arguments = parser.parse_args()
    setup = msgspec.json.decode(arguments.setup, type=Setup)
    init_logger()
    if arguments.list:
        arguments.list.write_bytes(msgspec.json.encode(listing(setup)))
    else:
        train(setup, arguments.choice, arguments.variant, arguments.trace)


def train(setup: Setup, choice: Choice, variant: Variant | None, trace: Path | None) -> None:
    if not ON_GPU:
        metrics.build_device_memory_monitor = NoMemoryMonitor
    if not ON_GPU or not hasattr(torch.distributed, "set_timeout"):  # pytorch#187387, in 2.14
        distributed_utils.set_pg_timeouts = lambda **_: None
    if variant == CASTS:
        casts.enable()
    with tempfile.TemporaryDirectory() as folder:
        traced_steps = TRACED_STEPS if trace else 0
        config = trainer_config(setup, choice, variant=variant, traced_steps=traced_steps, dump_folder=folder)
        trainer = config.build()
        modules = [module for part in trainer.model_parts for module in part.modules()]
        found = sum(isinstance(module, Float8Linear) for module in modules)
        LOGGER.info("the model has %d Float8Linear", found)
        for module in modules if not ON_GPU else ():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other sum of gradients
        if trace:
            trainer.train_step = waiting_for_gpu(trainer.train_step)
        try:
            trainer.train()
        finally:
            trainer.close()
        if trace and torch.distributed.get_rank() == 0:
            (file,) = Path(folder).rglob("rank0_trace.json.gz")
            trace.write_bytes(msgspec.json.encode(read_trace(file, choice, TRACED_STEPS)))
    torch.distributed.destroy_process_group()


def waiting_for_gpu(train_step: Callable[[Any], None]) -> Callable[[Any], None]:
    """A step that ends when the GPU has done it. Else the host runs ahead, and a trace has kernels of other steps."""

    def step(data_iterator: Any) -> None:
        train_step(data_iterator)
        torch.cuda.synchronize()

    return step


def listing(setup: Setup) -> dict[str, Any]:
    """What each choice converts; how many linears the layers have; and which device and software these are."""
    device = choose_device("cuda" if ON_GPU else "cpu")
    float8 = {choice: float8_names(setup, choice) for choice in LABELS}
    with_casts = names_with_casts(setup) if "fp8gate" in RECIPES[setup.recipe].casts else {}
    found = [fqn for fqn, *_ in model_spec(setup).model.traverse(Linear.Config) if fqn != HEAD]
    return {
        "float8": {choice: names for choice, names in float8.items() if names is not None},
        "with_casts": with_casts,
        "linears": len(found),
        "device": describe_device(device),
        "gpus": [kind_of(device).identity(torch.device(device.type, rank), rank) for rank in range(setup.ranks)],
        "software": describe_software(device),
    }


def names_with_casts(setup: Setup) -> dict[Choice, list[str] | None]:
    """What choices convert by what was measured with fp8gate's casts. They are as before after that.

    A table that is not there is said, and its choice left out.
    """
    found: dict[Choice, list[str] | None] = {}
    with casts.not_replaced():
        for choice in choices_with(CASTS, "table"):
            try:
                found[choice] = float8_names(setup, choice, CASTS)
            except TableError as error:
                print(f"{LABELS[choice]}, {CASTS}: left out: {error}", file=sys.stderr)
    return found


def float8_names(setup: Setup, choice: Choice, variant: Variant | None = None) -> list[str] | None:
    """The linears that a choice converts, by torchtitan's own steps. None if there is no such choice here."""
    if choice == "plan" and setup.plan is None:
        return None
    if choice.startswith("rule") and torchao_converts(setup.recipe, in_features=4096, out_features=4096) is None:
        return None
    config = trainer_config(setup, choice, variant=variant)
    config.model_spec.model.update_from_config(config=config)
    apply_overrides(config.override, config)
    found = config.model_spec.model.traverse(Linear.Config)
    return [fqn for fqn, linear, *_ in found if isinstance(linear, Float8Linear.Config)]


if __name__ == "__main__":
    main()
