"""Hugging Face Accelerate and Trainer, each by its public interface.

Accelerate converts the model itself, in `prepare`: the filter is `module_filter_func` of its AORecipeKwargs. Trainer
takes no such handler. Convert the model before you hand it over, and let Trainer run it under bf16 autocast, which is
what Accelerate's "fp8" does too.
    python examples/accelerate_trainer.py accelerate
    python examples/accelerate_trainer.py trainer
take two layers of a Llama 3 8B's widths. Without a GPU they decide by the tables of an NVIDIA H200 and train nothing,
which takes no memory; see torchao_convert.py for a tiny model that trains on a CPU. By default Accelerate leaves the
first and the last linear in bf16. Your own filter replaces that default, so name these linears in `filter_fqns` if they
should stay in bf16.
"""

from __future__ import annotations

import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import AORecipeKwargs
from example_options import HAS_GPU, make_parser, parse, say_that_nothing_is_trained
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fp8gate import AutoFilter, auto_filter

COMPILER = "inductor" if HAS_GPU else "no"  # the casts are fast only where they are compiled


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("framework", choices=FRAMEWORKS, nargs="?", default="accelerate")
    args = parse(parser)
    config = LlamaConfig(
        hidden_size=args.dim,
        intermediate_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=args.vocab,
    )
    wants_float8 = auto_filter(
        args.recipe,
        tokens=args.batch * args.sequence,  # rows of a linear's input, per rank and microbatch
        filter_fqns=["lm_head"],
        device=args.device,
        tables=args.tables,
    )
    with torch.device("meta"):
        wants_float8.check(LlamaForCausalLM(config))  # the model has no weights yet
    if not args.steps:
        print(wants_float8.report())
        say_that_nothing_is_trained()
        return
    model = LlamaForCausalLM(config)
    ids = torch.randint(args.vocab, (args.steps, args.batch, args.sequence))
    config = Float8LinearConfig.from_recipe_name(args.recipe)
    FRAMEWORKS[args.framework](model, ids, config, wants_float8)
    print(wants_float8.report())
    print(f"{sum(isinstance(m, Float8Linear) for m in model.modules())} Float8Linear in the model")


def with_accelerate(
    model: LlamaForCausalLM, ids: torch.Tensor, config: Float8LinearConfig, wants_float8: AutoFilter
) -> None:
    recipe = AORecipeKwargs(config=config, module_filter_func=wants_float8)
    accelerator = Accelerator(mixed_precision="fp8", kwargs_handlers=[recipe], dynamo_backend=COMPILER)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    for step, batch in enumerate(ids.to(accelerator.device)):
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step}: loss {loss.item():.4f}")


def with_trainer(
    model: LlamaForCausalLM, ids: torch.Tensor, config: Float8LinearConfig, wants_float8: AutoFilter
) -> None:
    convert_to_float8_training(model, module_filter_fn=wants_float8, config=config)
    examples = [{"input_ids": row, "labels": row} for row in ids.flatten(0, 1)]
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            per_device_train_batch_size=ids.shape[1],
            num_train_epochs=1,
            learning_rate=1e-3,
            bf16=True,
            use_cpu=not HAS_GPU,
            torch_compile=COMPILER != "no",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        )
        trainer = Trainer(model=model, args=options, train_dataset=examples)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for step, loss in enumerate(losses):
        print(f"step {step}: loss {loss:.4f}")


FRAMEWORKS = {"accelerate": with_accelerate, "trainer": with_trainer}


if __name__ == "__main__":
    main()
