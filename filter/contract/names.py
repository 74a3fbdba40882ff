"""The forms of a linear's name: without wrappers, without indices, within its block, as Hugging Face spells it. Pure.

`fqn` is the fully qualified name of a module in its model, as `named_modules` gives it. A role is the name of a linear
within its block, without indices: "self_attn.q_proj".
"""

from __future__ import annotations

import re
from functools import lru_cache

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module", "base_layer")
"""torch.compile, activation checkpointing, FSDP, Lightning and PEFT put these parts into module names."""
_OUTER_WRAPPERS = (("module",), ("base_model", "model"))
"""DistributedDataParallel and DeepSpeed put the first of these in front of every name, PEFT the second."""

_HUGGING_FACE = {
    "attention": "self_attn",
    "feed_forward": "mlp",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "wqkv": "qkv_proj",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
}
"""The parts of a Llama-style block: torchtitan's name -> Hugging Face's."""
_TORCHTITAN_ONLY = "qkv_linear"
"""torchtitan puts this part between the attention and its projections. Hugging Face has no such part."""


@lru_cache(maxsize=2**17)
def plain_name(fqn: str) -> str:
    """A layer's name as the model's author wrote it, without the parts that wrappers put into it."""
    if "._" not in fqn and not fqn.startswith(("_", "module.", "base_model.")) and not fqn.endswith(".base_layer"):
        return fqn  # most names have no wrapper: not splitting them saves a microsecond
    return ".".join(_without_outer_wrappers(without_wrappers(fqn.split("."))))


def _without_outer_wrappers(names: list[str]) -> list[str]:
    for outer in _OUTER_WRAPPERS:
        if len(names) > len(outer) and tuple(names[: len(outer)]) == outer:
            return _without_outer_wrappers(names[len(outer) :])
    return names


def without_wrappers(names: list[str]) -> list[str]:
    """The parts of a name that are the model's own."""
    return [name for name in names if name not in _WRAPPERS]


def without_indices(fqn: str) -> str:
    """The name with layer indices as *: "layers.3.mlp.w1" -> "layers.*.mlp.w1"."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", fqn)


def block_role(name_in_block: str) -> str:
    """The role of a linear: its name within its block, without the indices of layers and experts inside the block."""
    return ".".join(_parts_without_indices(name_in_block))


def hugging_face_name(name: str) -> str:
    """A name without indices, in which the parts of a Llama-style block are spelled as Hugging Face spells them."""
    parts = _parts_without_indices(name)
    return ".".join(_HUGGING_FACE.get(part, part) for part in parts if part != _TORCHTITAN_ONLY)


def _parts_without_indices(name: str) -> list[str]:
    """The last part stays even if it is a number: it is the linear's own."""
    *parts, last = name.split(".")
    return [*(part for part in parts if not part.isdigit()), last]


def is_head(fqn: str) -> bool:
    """Whether this is the last linear, which is in no block: `lm_head`, or `output` at the top level."""
    return fqn == "output" or fqn.rpartition(".")[2] == "lm_head"
