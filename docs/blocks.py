"""Outputs shown in README.md and docs/: each is made by the command or the snippet that stands above it.

A block of the name NAME stands between `<!-- NAME -->` and `<!-- /NAME -->`, and `BLOCKS` says what makes it. Commands
run here as on an idle NVIDIA H200 with the software of its tables, so that the output is the same on every machine.

Run it, to write all blocks again: make docs
Only some of them: python docs/blocks.py explain explain-tp
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any
from unittest import mock

from fp8gate.filter.contract.devices import device_slug

ROOT = Path(__file__).resolve().parents[1]
DEVICE, H100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"
WIDTH = 110
"""Characters in a line of output: what a page shows beside its navigation without a scroll bar, and GitHub too."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
"""Whose blocks are made here, and whose examples are tested."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.M | re.S)
BLOCK = re.compile(r"<!-- (?P<name>[\w-]+) -->\n(?P<text>.*?)<!-- /(?P=name) -->", flags=re.S)

Maker = Callable[[str], str]
"""What makes a block: it takes the page above the block, and returns the block's Markdown."""


def main(names: Sequence[str]) -> None:
    for name in names:
        if name not in BLOCKS:
            raise SystemExit(f"{name}: expected one of {', '.join(BLOCKS)}")
    for path in PAGES:
        text = path.read_text()
        renewed = rewritten(text, names or tuple(BLOCKS))
        if renewed != text:
            path.write_text(renewed)
            print(f"wrote {path.relative_to(ROOT)}")


def rewritten(page: str, names: Sequence[str]) -> str:
    """The page with the blocks of these names made again."""

    def renew(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in names:
            return found[0]
        return f"<!-- {name} -->\n{BLOCKS[name](page[: found.start()])}<!-- /{name} -->"

    return BLOCK.sub(renew, page)


def fences(page: str, language: str) -> list[str]:
    """The fenced blocks of a page that are in this language."""
    return [text for found, text in FENCE.findall(page) if found == language]


def commands(page: str) -> list[str]:
    """The commands that a page shows behind a "$ ", without comments; a line that ends with a backslash goes on."""
    lines = "\n".join(fences(page, "console")).replace("\\\n", "").splitlines()
    return [shlex.join(shlex.split(line[2:], comments=True)) for line in lines if line.startswith("$ ")]


def command_output(above: str) -> str:
    """What the fp8gate command directly above prints."""
    from typer.testing import CliRunner

    from fp8gate.cli import app

    program, *arguments = shlex.split(commands(above)[-1])
    if program != "fp8gate":
        raise ValueError(f"expected an fp8gate command above the block, found {program}")
    with on_the_measured_device():
        result = CliRunner().invoke(app, arguments)
    if result.exit_code:
        raise RuntimeError(f"{commands(above)[-1]}: exit code {result.exit_code}: {result.output}")
    return _fenced(result.stdout)


def snippet_output(above: str) -> str:
    """What the Python snippet directly above prints, for a Llama 3 8B. A warning, which no page shows, is an error."""
    from fp8gate.filter.policy.findings import FilterWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error", FilterWarning)
        return _fenced(run_snippet(fences(above, "python")[-1])[1])


def run_snippet(source: str, **names: Any) -> tuple[dict[str, Any], str]:
    """Run a snippet as on the measured device; the names that it leaves, and what it prints.

    It finds a `model`, Llama 3 8B without weights. names: others that it finds.
    """
    printed = io.StringIO()
    with on_the_measured_device(), contextlib.redirect_stdout(printed):
        namespace: dict[str, Any] = {"model": llama3_8b(), **names}
        exec(compile(source, "<snippet>", "exec"), namespace)
    return namespace, printed.getvalue()


def llama3_8b() -> Any:
    """The linears of Llama 3 8B under the names of Hugging Face's, on the meta device."""
    import torch
    from torch import nn

    from fp8gate.filter.model.model_config import linear_roles, load_model

    class Llama(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> None:
            for linear in self.modules():
                if isinstance(linear, nn.Linear):
                    linear(torch.empty(*input_ids.shape, linear.in_features))

    model = Llama()
    roles = linear_roles(load_model("llama3-8b"))
    layers = max(role.count for role in roles)
    for layer in range(layers):
        for role in roles:
            if role.count == layers:
                _add_linear(model, role.fqn.replace("*", str(layer)), role.in_features, role.out_features)
    for role in roles:
        if role.count == 1:
            _add_linear(model, role.fqn, role.in_features, role.out_features)
    return model


def _add_linear(model: Any, fqn: str, in_features: int, out_features: int) -> None:
    from torch import nn

    *parents, name = fqn.split(".")
    for parent in parents:
        if parent not in dict(model.named_children()):
            model.add_module(parent, nn.Module())
        model = getattr(model, parent)
    model.add_module(name, nn.Linear(in_features, out_features, bias=False, device="meta"))


@contextlib.contextmanager
def on_the_measured_device() -> Iterator[None]:
    """As on an NVIDIA H200 with the software of its tables: in this checkout, and without tables of the user's own."""
    from fp8gate import read_table
    from fp8gate.filter.contract import software_check
    from fp8gate.filter.locate import find_table

    software = read_table(ROOT / "thresholds" / "nvidia-h200" / "rowwise.yaml").software
    releases = {"torch": software.torch, "torchao": software.torchao, "triton": software.triton}
    really = metadata.version
    with contextlib.ExitStack() as stack:
        empty = stack.enter_context(tempfile.TemporaryDirectory())
        environment = {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb", "XDG_DATA_HOME": empty}
        stack.enter_context(mock.patch.dict(os.environ, environment))
        os.environ.pop("FP8GATE_THRESHOLDS", None)
        stack.enter_context(mock.patch.object(metadata, "version", lambda name: releases.get(name) or really(name)))
        stack.enter_context(mock.patch.object(software_check, "DRIVER_VERSION", Path(empty) / "no-driver"))
        stack.enter_context(mock.patch.object(find_table, "local_device_name", return_value=DEVICE))
        stack.callback(os.chdir, Path.cwd())
        os.chdir(ROOT)
        yield


def _fenced(printed: str) -> str:
    return f"```text\n{printed.rstrip().replace(f'{ROOT}/', '')}\n```\n"


def benchmark(name: str, call: Callable[[Any], str]) -> Maker:
    """A block that a script of benchmarks/ makes: the Markdown that `call` returns for its module."""

    def make(above: str) -> str:
        with mock.patch.object(sys, "path", [str(ROOT / "benchmarks"), *sys.path]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tables were measured with another torch than the installed one
            return call(import_module(name)) + "\n"

    return make


def journals(folder: str) -> list[Path]:
    """What was measured and is committed in a folder of benchmarks/data."""
    return sorted((ROOT / "benchmarks" / "data" / folder).glob("*.jsonl"))


def _tp_block(output: Any) -> str:
    return "\n\n".join(output.headline(*output.read_journal(file)) for file in journals("tp-block"))


def _block_settings(output: Any) -> str:
    return "\n\n".join(output.headline(*output.read_journal(file)) for file in journals("block-settings"))


def _casts_plans(script: Any) -> str:
    """Plans of the layers that were planned with either casts."""

    def block(plan: Any) -> tuple[object, ...]:
        return plan.model, plan.tp, plan.recompute, plan.recipe

    plans = list(script.packaged_plans(H100))
    ours = {block(plan) for plan in plans if plan.variant.casts == "fp8gate"}
    return str(script.gains([plan for plan in plans if block(plan) in ours]))


def _scaling(scaling: Any) -> str:
    return str(scaling.report(scaling.read_costs(scaling.COSTS), [1, 8, 64, 512]))


def _two_sweeps(two_sweeps: Any) -> str:
    return str(two_sweeps.coverage(two_sweeps.FIRST, two_sweeps.SECOND))


def _two_h100_sweeps(two_sweeps: Any) -> str:
    return str(two_sweeps.coverage(_h100_sweep("first"), _h100_sweep("second")))


def _third_h100_board(two_sweeps: Any) -> str:
    return str(two_sweeps.coverage(ROOT / "thresholds" / device_slug(H100), _h100_sweep("older")))


def _h100_sweep(which: str) -> Path:
    return ROOT / "benchmarks" / "data" / f"{device_slug(H100)}-{which}-sweep"


BLOCKS: dict[str, Maker] = {
    "summary": snippet_output,
    "explain": command_output,
    "explain-8b": command_output,
    "explain-tp": command_output,
    "train_llama": benchmark("train_llama_output", lambda output: str(output.headline(journals("train-llama")))),
    "train_llama_casts": benchmark(
        "train_llama_output", lambda output: str(output.headline(journals("train-llama-casts")))
    ),
    "plan_choices": benchmark("plan_choices", lambda script: str(script.gains(list(script.packaged_plans(DEVICE))))),
    "plan_choices_h100": benchmark("plan_choices", lambda script: str(script.gains(list(script.packaged_plans(H100))))),
    "tp_block": benchmark("tp_block_output", _tp_block),
    "train_titan": benchmark("train_titan_output", lambda output: str(output.headline(journals("train-titan")))),
    "train_titan_casts": benchmark(
        "train_titan_output", lambda output: str(output.headline(journals("train-titan-casts")))
    ),
    "block_settings": benchmark("block_settings_output", _block_settings),
    "casts_plans": benchmark("plan_choices", _casts_plans),
    "sweep_seconds": benchmark("sweep_seconds", lambda script: str(script.report(script.read_costs()))),
    "against_torchao_rule": benchmark("against_torchao_rule", lambda script: str(script.compare(DEVICE))),
    "against_h100": benchmark("against_torchao_rule", lambda script: str(script.compare(H100, min_speedup=1.0))),
    "scaling": benchmark("scaling", _scaling),
    "two_sweeps": benchmark("two_sweeps", _two_sweeps),
    "two_h100_sweeps": benchmark("two_sweeps", _two_h100_sweeps),
    "third_h100_board": benchmark("two_sweeps", _third_h100_board),
}
"""Every block there is: its name, and what makes it."""


if __name__ == "__main__":
    main(sys.argv[1:])
