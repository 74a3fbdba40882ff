"""Build any model of `transformers` by its config.json, without memory, and make the inputs of a microbatch.

In: a config.json. Out: a `BuiltModel`, whose parameters have shapes and no data; inputs on the meta device.
transformers builds the class that `architectures` names; nothing is downloaded and no code of the model's own is run.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from fp8gate.filter.contract.shapes import FLOAT8_MULTIPLE
from fp8gate.filter.model.model_config import ModelError
from fp8gate.filter.observe.copy_without_data import quiet
from fp8gate.filter.observe.observe import default_dtype, first_line_of, observe

HOW_ELSE = (
    "describe its linears instead: --linear NAME,IN_FEATURES,OUT_FEATURES,COUNT[,ROWS], once for each kind; or ask in "
    "Python: auto_filter(RECIPE, tokens=TOKENS).check(model, example_inputs=...)"
)
MAX_LAYERS = 10_000  # building a million would take all memory
AUDIO_SAMPLES = 16_000  # a second of sound, for models that take the wave
TEXT = "input_ids"
_LONGEST = ("max_position_embeddings", "max_target_positions", "n_positions", "n_ctx")
"""Fields of a config.json that say how many positions the model knows."""


class BuiltModel(NamedTuple):
    """A model in bf16 whose parameters are on the meta device and whose buffers are real. facts: its config.json."""

    module: Any
    config: Any
    facts: Mapping[str, Any]


def build_model(model: str, text: str) -> BuiltModel:
    """The model that the text of a config.json describes. model: what messages call it.

    Raises ModelError if transformers is missing or cannot build it.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{model}: needs transformers: in a checkout: pip install '.[models]'; or {HOW_ELSE}"
        ) from error
    with quiet_transformers():
        config, facts = _read_config(transformers, model, text)
        return BuiltModel(_build(transformers, model, config), config, facts)


def example_inputs(
    module: Any, config: Any, tokens: int, *, sequence: int | None = None, samples: int = 1
) -> dict[str, Any]:
    """What a microbatch of a model looks like, on the meta device: text, images, or sound, by its main input.

    sequence: tokens of one sequence; None for as many as the model takes. samples: images or sounds. The text of an
    encoder-decoder's decoder has `tokens` tokens in as many sequences.
    """
    import torch

    longest = longest_sequence(config) or tokens
    main = getattr(module, "main_input_name", TEXT)
    sequence = sequence or (min(tokens, longest) if tokens % min(tokens, longest) == 0 else tokens)
    ids = torch.empty(tokens // sequence, sequence, dtype=torch.long, device="meta")
    if main == TEXT:
        inputs = {main: ids}
    else:
        inputs = {main: _pictures_or_sounds(main, config, samples)}
        ids = torch.empty(samples, min(longest, max(1, tokens // samples)), dtype=torch.long, device="meta")
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def longest_sequence(config: Any) -> int | None:
    """The most tokens that the model takes in one sequence; None for any number."""
    text = getattr(config, "text_config", None) or config
    found = (getattr(text, field, None) for field in _LONGEST)
    return next((size for size in found if isinstance(size, int) and size > 0), None)


def microbatch(module: Any, config: Any, tokens: int, sequence: int | None = None) -> dict[str, Any]:
    """`example_inputs` of as many images or sounds as come nearest to `tokens` rows in most linears, or of text.

    Raises ObserveError if the forward cannot run without data.
    """
    samples = 1
    if getattr(module, "main_input_name", TEXT) != TEXT:
        one = observe(module, example_inputs(module, config, tokens))
        rows = Counter(seen.rows for seen in one.linears.values() if seen.rows)
        rows_of_one = rows.most_common(1)[0][0] if rows else FLOAT8_MULTIPLE
        step = FLOAT8_MULTIPLE // math.gcd(rows_of_one, FLOAT8_MULTIPLE)  # so that their rows are such a multiple
        samples = step * max(1, round(tokens / rows_of_one / step))
    return example_inputs(module, config, tokens, sequence=sequence, samples=samples)


def towers(module: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The models inside a model of text that take images or sound, by name."""
    for name, child in module.named_children():
        main = getattr(child, "main_input_name", TEXT) if hasattr(child, "config") else TEXT
        if main == TEXT:
            yield from towers(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


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
        with _parameters_without_data(), default_dtype(torch.bfloat16):
            return ways[0](config).eval()
    except Exception as error:
        raise ModelError(f"{model}: transformers cannot build it, {first_line_of(error)}; {HOW_ELSE}") from error


@contextmanager
def _parameters_without_data() -> Iterator[None]:
    """Every parameter that a module gets is one on the meta device. Buffers, such as positions, are computed."""
    from torch import nn

    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), param.requires_grad)
        register(module, name, param)

    setattr(nn.Module, register.__name__, register_on_meta)
    try:
        yield
    finally:
        setattr(nn.Module, register.__name__, register)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers warns of kernels that are not installed and of how it initializes: nothing runs here."""
    with quiet("transformers", logging.ERROR), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
