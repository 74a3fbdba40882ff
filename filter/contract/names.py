"""Names of linears: without wrappers, without indices, within a block, in either of the usual spellings. Pure.

`fqn` is the fully qualified name of a module in its model, as `named_modules` gives it.
"""

from __future__ import annotations

import re

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_OUTER_WRAPPER = "module"
"""torch.compile, activation checkpointing and FSDP put these into module names. DistributedDataParallel puts the last
one in front."""

_HUGGING_FACE = {
    "attention": "self_attn",
    "feed_forward": "mlp",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
}
"""torchtitan's names of the parts of a Llama-style block, and Hugging Face's."""
_NO_PART = "qkv_linear"  # torchtitan puts it between the attention and its projections


def plain_name(fqn: str) -> str:
    """A layer's name as the model's author wrote it, without what wrappers put into it."""
    if "._" not in fqn and not fqn.startswith(("_", _OUTER_WRAPPER)):
        return fqn  # the usual case, without a split: a microsecond less
    names = fqn.split(".")
    return ".".join(without_wrappers(names[1:] if names[0] == _OUTER_WRAPPER else names))


def without_wrappers(names: list[str]) -> list[str]:
    """The parts of a name that no wrapper has put there."""
    return [name for name in names if name not in _WRAPPERS]


def without_indices(fqn: str) -> str:
    """The name with layer indices as *: "layers.3.mlp.w1" -> "layers.*.mlp.w1"."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", fqn)


def block_role(fqn: str) -> str:
    """A role: the name within a block, without the indices of layers and experts that stand inside it."""
    *parts, last = fqn.split(".")
    return ".".join([*(part for part in parts if not part.isdigit()), last])


def hugging_face_role(fqn: str) -> str:
    """A linear's role, spelled as Hugging Face names the parts of a Llama."""
    parts = block_role(fqn).split(".")
    return ".".join(_HUGGING_FACE.get(part, part) for part in parts if part != _NO_PART)


def is_head(fqn: str) -> bool:
    """Whether this names the last linear, which stands outside of the blocks: lm_head, or output at the top."""
    return fqn == "output" or fqn.rpartition(".")[2] == "lm_head"
