"""Train a Llama end to end on one device: what each choice of float8 layers gains, and whether its loss follows bf16's.

The model is transformers' own, with the widths of Llama 3 8B, its embedding and its head, and as many layers as asked
for. Its parameters are bf16, and fused AdamW trains them. On a GPU each decoder layer is compiled by itself, so that
all layers share one graph, and the head is compiled with the loss, as torchtitan does. bf16 has Inductor's defaults,
float8 the recipe's production settings. The head stays in bf16 for every choice (`filter_fqns`, as in torchtitan),
unless --convert-head lets each choice decide. Choices that convert the same linears are trained as one model.
--casts adds models with fp8gate's casts: all float8, and what the table and the plan of these casts convert.

All models are on the device at once and take turns. A visit is a pause, then steps that do not count, until the GPU
has the clock that this model gives it, then whole seconds. Each round visits all models in random order, and gains are
paired by round. Every step trains, and all models see the same tokens in the same order. Half of the tokens follow
from the token before, and the others are drawn by Zipf's law, so that there is something to learn: with uniformly
random tokens every loss would stay at ln(vocab).

To tell the noise, bf16 is trained from three different weights. A float8 loss (the mean over the last quarter of the
steps) should lie where the loss of one more training in bf16 would lie with 95 % probability: nobody minds such a
change. The same weights would be no better judge: in bf16 too, sums in another order soon lead elsewhere. The three
runs also show what bf16 gains over itself, and a gain has to exceed that. Some hundred steps show whether the losses
part. They do not show what training converges to.

Run it: python benchmarks/train_llama.py --recipe rowwise --out DIR
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from train_llama_choices import CHOICES, MODEL, casts_choices, choices, runs_of, say
from train_llama_output import ROUNDS, Header, Run, Visit, report

from fp8gate import casts
from fp8gate.calibrate.arms.linear import convert
from fp8gate.calibrate.device.cuda.kind import VISIT_PAUSE_S
from fp8gate.calibrate.device.lock import DeviceLock
from fp8gate.calibrate.device.registry import choose_device, describe_device, describe_software, kind_of
from fp8gate.calibrate.device.watch import Watch
from fp8gate.calibrate.planning.subject import sequence_of
from fp8gate.filter.contract.recipes import RECIPES, Recipe, recipes_with
from fp8gate.filter.model.model_config import BUNDLED, ModelConfig

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
SETTLE_STEPS = 3
"""With 4 layers of these widths they take 0.2 s, which a GPU at its power limit needs (`VISIT_SETTLE_S`)."""
ADAMW = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}  # as Llama was trained
WARM_UP = 0.1  # the share of the steps in which the learning rate rises


def main() -> None:
    arguments = parse()
    device = choose_device(None)
    sizes = TINY if arguments.tiny else {}
    model = msgspec.structs.replace(BUNDLED[MODEL], **sizes, num_hidden_layers=arguments.layers)
    whole = build(model, torch.device("meta"))
    found = choices(whole, arguments, device)
    with_casts = casts_choices(whole, arguments, device) if arguments.casts else {}
    header = Header(
        model="tiny" if arguments.tiny else MODEL,
        recipe=arguments.recipe,
        layers=arguments.layers,
        tokens=arguments.tokens,
        steps=arguments.steps,
        device=describe_device(device),
        software=describe_software(device),
        runs=runs_of(found, with_casts),
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"train-llama-{arguments.recipe}.jsonl"
    with DeviceLock(device), open(path, "ab", buffering=0) as file:
        file.write(msgspec.json.encode(header) + b"\n")
        visits: dict[str, list[Visit]] = defaultdict(list)
        for visit in train(header, model, device):
            file.write(msgspec.json.encode(visit) + b"\n")
            visits[visit.run].append(visit)
    print(report(header, visits))
    say(f"wrote {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder; its train-llama-<recipe>.jsonl grows")
    parser.add_argument("--layers", type=int, default=4, help="all models must fit into memory together")
    parser.add_argument("--tokens", type=int, default=8192, help="of a step: sequences of at most 8192")
    parser.add_argument("--steps", type=int, default=320, help=f"of each model, a multiple of {ROUNDS}")
    parser.add_argument("--tables", type=Path, help="a table or folder of tables; default: those of fp8gate")
    parser.add_argument("--plan", type=Path, help="a plan; default: fp8gate's for this model, recipe and tokens")
    parser.add_argument(
        "--choices", nargs="+", choices=CHOICES, default=[*CHOICES], help="what to train beside bf16; default: all"
    )
    parser.add_argument("--casts", action="store_true", help="also train with fp8gate's casts")
    parser.add_argument("--casts-plan", type=Path, help="a plan of these casts; default: fp8gate's")
    parser.add_argument("--convert-head", action="store_true", help="let each choice decide on the head too")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try this on a CPU")
    arguments = parser.parse_args()
    if arguments.steps % ROUNDS or arguments.steps <= ROUNDS * SETTLE_STEPS:
        least = ROUNDS * (SETTLE_STEPS + 1)
        parser.error(f"--steps: expected a multiple of {ROUNDS}, at least {least}; got {arguments.steps}")
    if arguments.casts and "fp8gate" not in RECIPES[arguments.recipe].casts:
        parser.error(f"--casts: expected one of {', '.join(recipes_with('fp8gate'))}; got {arguments.recipe}")
    return arguments


class Training:
    """One model with its optimizer. It stays on the device as long as other models are compared with it."""

    def __init__(self, run: Run, header: Header, model: ModelConfig, device: torch.device) -> None:
        torch.manual_seed(run.weights)
        self.model = build(model, device)
        self.casts = run.casts
        self.head_loss = head_loss
        if run.float8:
            convert(self.model, header.recipe, lambda _, fqn: fqn in run.float8)
        if device.type == "cuda":
            self.compile(inductor_of(run, header.recipe))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **ADAMW, fused=True)  # type: ignore[arg-type]
        warm_up = max(1, round(WARM_UP * header.steps))
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1 / warm_up, total_iters=warm_up)

    def compile(self, inductor: dict[str, Any]) -> None:
        """Compile the layers and the head. A graph break, or too many graphs, is an error when they first run."""
        for layer in self.model.model.layers:
            layer.compile(fullgraph=True, dynamic=False, options=inductor)
        self.head_loss = torch.compile(head_loss, fullgraph=True, dynamic=False, options=inductor)

    def loss(self, ids: Tensor) -> Tensor:
        """ids has the shape (batch, sequence + 1)."""
        hidden = self.model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        return self.head_loss(self.model.lm_head, hidden, ids[:, 1:])

    def start(self, ids: Tensor) -> None:
        """Run once, which compiles and tunes, without changing the weights."""
        with casts.replaced() if self.casts == "fp8gate" else casts.not_replaced():
            self.loss(ids).backward()  # type: ignore[no-untyped-call]
        self.optimizer.zero_grad()

    def step(self, ids: Tensor) -> Tensor:
        loss = self.loss(ids)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return loss.detach()

    def resident_bytes(self) -> int:
        """What the model and its optimizer keep on the device between two steps."""
        states = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers(), *states))


def inductor_of(run: Run, recipe: Recipe) -> dict[str, Any]:
    """Inductor's options for a run. Dynamo takes models with equal options for one: those with fp8gate's casts differ.

    They do by a setting that has its default, so that nothing else does.
    """
    options = {**RECIPES[recipe].inductor} if run.float8 else {}
    return {**options, "epilogue_fusion": True} if run.casts == "fp8gate" else options


def build(model: ModelConfig, device: torch.device) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    facts = {name: fact for name, fact in msgspec.structs.asdict(model).items() if fact is not None}
    config = AutoConfig.for_model(**facts)
    make: Any = AutoModelForCausalLM.from_config
    with device:
        return make(config, dtype=torch.bfloat16, attn_implementation="sdpa")


def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(head(hidden).flatten(0, 1).float(), targets.flatten())


def random_tokens(steps: int, batch: int, sequence: int, vocab: int) -> Tensor:
    """Tokens of the shape (steps, batch, sequence + 1), the same at every call."""
    rng = torch.Generator().manual_seed(0)
    ids = zipf((steps, batch, sequence + 1), vocab, rng)
    successors, follows = zipf((vocab,), vocab, rng), torch.rand(ids.shape, generator=rng) < 0.5
    for i in range(1, sequence + 1):
        ids[..., i] = torch.where(follows[..., i], successors[ids[..., i - 1]], ids[..., i])
    return ids


def zipf(shape: tuple[int, ...], vocab: int, rng: torch.Generator) -> Tensor:
    """Tokens by Zipf's law: token i is drawn about as often as 1 / (i + 1)."""
    return ((vocab + 1) ** torch.rand(shape, generator=rng, dtype=torch.float64)).long() - 1


def train(header: Header, model: ModelConfig, device: torch.device) -> Iterator[Visit]:
    """Train all runs. Yields each visit as soon as it is done."""
    start = time.monotonic()
    sequence = sequence_of(model.max_position_embeddings, header.tokens, None)
    ids = random_tokens(header.steps, header.tokens // sequence, sequence, model.vocab_size).to(device)
    trainings: dict[str, Training] = {}
    for run in header.runs:
        trainings[run.name] = Training(run, header, model, device)
        trainings[run.name].start(ids[0])
        say(f"{time.monotonic() - start:.0f} s: {run.name} is ready, {len(run.float8)} linears in float8")
    watch, rng = kind_of(device).make_watch(device), random.Random(0)
    for i, part in enumerate(ids.chunk(ROUNDS)):
        for run in rng.sample(header.runs, len(header.runs)):
            visit = make_visit(trainings[run.name], part, watch, device, run=run.name, round=i)
            slowdown = f", {visit.slowdown}" if visit.slowdown else ""
            say(f"{time.monotonic() - start:.0f} s: {run.name}: {visit.step_s * 1e3:.2f} ms a step{slowdown}")
            yield visit


def make_visit(training: Training, ids: Tensor, watch: Watch, device: torch.device, **fields: Any) -> Visit:
    """Train for these steps. The watch is asked while a GPU still runs them, because the host is ahead of it."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        time.sleep(VISIT_PAUSE_S)
        others_bytes = torch.cuda.memory_allocated(device) - training.resident_bytes()
        torch.cuda.reset_peak_memory_stats(device)
    losses = [training.step(batch) for batch in ids[:SETTLE_STEPS]]
    synchronize(device)
    begin = time.perf_counter()
    losses += [training.step(batch) for batch in ids[SETTLE_STEPS:]]
    slowdown, sm_clock_mhz = watch.slowdown(), watch.sm_clock_mhz()
    synchronize(device)
    return Visit(
        **fields,
        step_s=(time.perf_counter() - begin) / (len(ids) - SETTLE_STEPS),
        losses=tuple(torch.stack(losses).tolist()),
        peak_gib=round((torch.cuda.max_memory_allocated(device) - others_bytes) / 2**30, 3) if on_gpu else None,
        sm_clock_mhz=sm_clock_mhz,
        slowdown=slowdown,
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
