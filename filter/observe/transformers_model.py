"""Describe any model of `transformers` by its config.json: built without memory, and observed in one forward.

In: a config.json, the tokens of a microbatch. Out: a `DescribedModel`: its linears with counts, sizes and rows.
transformers builds the class that `architectures` names; nothing is downloaded and no code of the model's own is run.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fp8gate.filter.contract.names import without_indices
from fp8gate.filter.contract.shapes import FLOAT8_MULTIPLE
from fp8gate.filter.model.described_model import DescribedModel, LinearRole
from fp8gate.filter.model.linear_layer import linears_of
from fp8gate.filter.model.model_config import ModelError
from fp8gate.filter.model.model_linears import grouped_weights, other_products
from fp8gate.filter.model.observed import Observation, ObservedLinear, ObserveError
from fp8gate.filter.model.parallel import OwnPlan
from fp8gate.filter.observe.copy_without_data import quiet
from fp8gate.filter.observe.observe import first_line_of, observe

HOW_ELSE = (
    "describe its linears instead: --linear NAME,IN_FEATURES,OUT_FEATURES,COUNT[,ROWS], once for each kind; or ask in "
    "Python: auto_filter(RECIPE, tokens=TOKENS).check(model, example_inputs=...)"
)
MAX_LAYERS = 10_000  # building a million would take all memory
AUDIO_SAMPLES = 16_000  # a second of sound, for models that take the wave


def describe_by_transformers(model: str, text: str, tokens: int) -> DescribedModel:
    """The model that the text of a config.json describes. model: what messages call it.

    Raises ModelError if transformers cannot build it, or if its forward cannot run without data.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{model}: needs transformers: in a checkout: pip install '.[models]'; or {HOW_ELSE}"
        ) from error
    with _quiet():
        config, facts = _read_config(transformers, model, text)
        built = _build(transformers, model, config)
        try:
            observation = _observe_microbatch(built, config, tokens)
        except ObserveError as error:
            raise ModelError(f"{model}: {error}; {HOW_ELSE}") from error
    return DescribedModel(
        name=model,
        linears=tuple(_roles(built, observation)),
        parallel_plan=OwnPlan(getattr(built, "tp_plan", None) or {}),
        observation=observation,
        heads=_heads(config),
        note=_note(built, facts),
        can_be_planned=False,
    )


def _observe_microbatch(built: Any, config: Any, tokens: int) -> Observation:
    """Of as many images or sounds as come nearest to `tokens` rows in most linears, or of text of that many tokens."""
    samples = 1
    if getattr(built, "main_input_name", "input_ids") != "input_ids":
        one = observe(built, example_inputs(built, config, tokens, samples=1))
        rows = Counter(seen.rows for seen in one.linears.values() if seen.rows)
        many = tokens / rows.most_common(1)[0][0] if rows else 1.0
        samples = FLOAT8_MULTIPLE * max(1, round(many / FLOAT8_MULTIPLE))  # so that their rows are such a multiple
    return observe(built, example_inputs(built, config, tokens, samples=samples))


def example_inputs(built: Any, config: Any, tokens: int, *, samples: int = 1) -> dict[str, Any]:
    """What a microbatch of this model looks like, on the meta device: text, images, or sound, by its main input.

    samples: images or sounds. The text of an encoder-decoder's decoder has `tokens` tokens in as many sequences.
    """
    import torch

    text = getattr(config, "text_config", None) or config
    longest = getattr(text, "max_position_embeddings", None) or tokens
    main = getattr(built, "main_input_name", "input_ids")
    sequence = min(tokens, longest) if tokens % min(tokens, longest) == 0 else tokens
    ids = torch.empty(tokens // sequence, sequence, dtype=torch.long, device="meta")
    if main == "input_ids":
        inputs = {main: ids}
    else:
        inputs = {main: _pictures_or_sounds(main, config, samples)}
        ids = torch.empty(samples, min(longest, max(1, tokens // samples)), dtype=torch.long, device="meta")
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def _pictures_or_sounds(main: str, config: Any, samples: int) -> Any:
    import torch

    if main == "input_features":
        mels, frames = getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 1500)
        return torch.empty(samples, mels, frames, device="meta")
    if main == "input_values":
        return torch.empty(samples, AUDIO_SAMPLES, device="meta")
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.empty(samples, getattr(vision, "num_channels", 3), height, width, device="meta")


def _read_config(transformers: Any, model: str, text: str) -> tuple[Any, Mapping[str, Any]]:
    try:
        facts = json.loads(text)
        settings = {name: value for name, value in facts.items() if name not in ("model_type", "quantization_config")}
        config = transformers.AutoConfig.for_model(facts["model_type"], **settings)
    except Exception as error:
        raise ModelError(f"{model}: transformers cannot read it, {first_line_of(error)}; {HOW_ELSE}") from error
    for name, value in facts.items():
        if name.endswith("layers") and isinstance(value, int) and value > MAX_LAYERS:
            raise ModelError(f"{model}: $.{name}: expected at most {MAX_LAYERS}, found {value}")
    return config, facts


def _build(transformers: Any, model: str, config: Any) -> Any:
    """The model of the task that `architectures` names, else of language modelling, else without a head."""
    import torch

    named = next((getattr(transformers, name, None) for name in config.architectures or ()), None)
    automatic = (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM, transformers.AutoModel)
    ways = [named] if named else [auto.from_config for auto in automatic if type(config) in auto._model_mapping]
    if not ways:
        raise ModelError(f"{model}: $.model_type: transformers has no model of {config.model_type!r}; {HOW_ELSE}")
    if getattr(config, "pad_token_id", None) is None:  # heads of classification ask for it
        config.pad_token_id = 0
    try:
        with torch.device("meta"):
            return ways[0](config)
    except Exception as error:
        raise ModelError(f"{model}: transformers cannot build it, {first_line_of(error)}; {HOW_ELSE}") from error


def _roles(built: Any, observation: Observation) -> Iterator[LinearRole]:
    """One role for all linears that differ in indices only, and have the same size and rows.

    Raises ModelError if the model has none that is called.
    """
    kinds: Counter[tuple[str, int, int, ObservedLinear]] = Counter()
    examples: dict[tuple[str, int, int, ObservedLinear], str] = {}
    for fqn, linear in linears_of(built):
        kind = (without_indices(fqn), linear.in_features, linear.out_features, observation.linears[fqn])
        kinds[kind] += 1
        examples.setdefault(kind, fqn)
    if not any(seen.calls for *_, seen in kinds):
        raise ModelError(f"{type(built).__name__}: expected an nn.Linear that its forward calls; found none")
    for kind, count in kinds.items():
        fqn, in_features, out_features, seen = kind
        role = fqn.rpartition("*.")[2]
        sizes = {"in_features": in_features, "out_features": out_features}
        yield LinearRole(
            role=role,
            fqn=fqn,
            count=count,
            **sizes,
            rows=seen.rows,
            example=examples[fqn, in_features, out_features, seen],
        )


def _heads(config: Any) -> dict[str, int]:
    text = getattr(config, "text_config", None) or config
    fields = ("num_attention_heads", "num_key_value_heads")
    return {field: heads for field in fields if isinstance(heads := getattr(text, field, None), int)}


def _note(built: Any, facts: Mapping[str, Any]) -> str | None:
    notes = []
    if quantized := facts.get("quantization_config"):
        method = quantized.get("quant_method", "some method") if isinstance(quantized, dict) else "some method"
        notes.append(f"the checkpoint is quantized ({method}): this is about its linears in bf16")
    if others := (*grouped_weights(built), *other_products(built)):
        notes.append(f"no nn.Linear, left in bf16 and not counted here: {', '.join(dict.fromkeys(others))}")
    return "; ".join(notes) or None


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns of kernels that are not installed and of how it initializes: nothing runs here."""
    with quiet("transformers", logging.ERROR), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
