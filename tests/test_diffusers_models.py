"""Transformers of diffusers: what is observed without data is what a real forward shows; modulation stays in bf16."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from real_forward import rows_of_calls
from torch import nn

from fp8gate import UnknownRowsWarning, auto_filter
from fp8gate.filter.contract.names import without_indices
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.observe.observe import observe

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # importing diffusers takes 3 s


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="needs diffusers, and so Python 3.11")


def meta(*shape):
    return torch.empty(shape, device="meta")


def flux_inputs(config, *, images, patches, words):
    return {
        "hidden_states": meta(images, patches, config.in_channels),
        "encoder_hidden_states": meta(images, words, config.joint_attention_dim),
        "pooled_projections": meta(images, config.pooled_projection_dim),
        "timestep": meta(images),
        "guidance": meta(images),
        "img_ids": meta(patches, 3),
        "txt_ids": meta(words, 3),
    }


FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "pooled_projection_dim": 24,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 4, 8),
}
SD3 = {
    "sample_size": 8,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 24,
    "out_channels": 4,
    "pos_embed_max_size": 8,
}
PIXART = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "cross_attention_dim": 32,
    "caption_channels": 48,
}


def sd3_inputs(config):
    return {
        "hidden_states": meta(3, config.in_channels, 8, 8),
        "encoder_hidden_states": meta(3, 7, config.joint_attention_dim),
        "pooled_projections": meta(3, config.pooled_projection_dim),
        "timestep": meta(3),
    }


def pixart_inputs(config):
    return {
        "hidden_states": meta(3, config.in_channels, 8, 8),
        "encoder_hidden_states": meta(3, 7, config.caption_channels),
        "timestep": meta(3),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


SMALL = {
    "FluxTransformer2DModel": (FLUX, lambda config: flux_inputs(config, images=3, patches=20, words=7)),
    "SD3Transformer2DModel": (SD3, sd3_inputs),
    "PixArtTransformer2DModel": (PIXART, pixart_inputs),
}


@pytest.mark.parametrize("name", SMALL)
def test_what_is_observed_is_what_a_real_forward_does(diffusers, name):
    sizes, inputs_of = SMALL[name]
    make = getattr(diffusers, name)
    model = make(**sizes)
    inputs = inputs_of(model.config)
    with torch.device("meta"):
        observed = observe(make(**sizes), inputs).linears
    real = rows_of_calls(model, inputs)
    linears = [fqn for fqn, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert (sorted(observed), sorted(real)) == (sorted(linears), sorted(linears))
    seen = {fqn: (linear.calls, linear.rows) for fqn, linear in observed.items()}
    assert seen == {fqn: (len(rows), min(rows)) for fqn, rows in real.items()}
    few = {fqn for fqn, (_, rows) in seen.items() if rows == 3}
    assert {"norm1.linear", "adaln_single.linear"} & {fqn.removeprefix("transformer_blocks.0.") for fqn in few}


IMAGES, PATCHES, WORDS = 16, 512, 128
CONVERTED = {
    "transformer_blocks.*.attn.to_q": 8192,
    "transformer_blocks.*.attn.to_k": 8192,
    "transformer_blocks.*.attn.to_v": 8192,
    "transformer_blocks.*.attn.to_out.*": 8192,
    "transformer_blocks.*.ff.net.*.proj": 8192,
    "transformer_blocks.*.ff.net.*": 8192,
    "transformer_blocks.*.ff_context.net.*.proj": 2048,
    "transformer_blocks.*.ff_context.net.*": 2048,
    "single_transformer_blocks.*.proj_mlp": 10_240,
    "single_transformer_blocks.*.proj_out": 10_240,
    "single_transformer_blocks.*.attn.to_q": 10_240,
    "single_transformer_blocks.*.attn.to_k": 10_240,
    "single_transformer_blocks.*.attn.to_v": 10_240,
}
"""Of FLUX.1's widths on an H200: all linears that see the images, and the wide ones that see the text only."""
MODULATION = {
    "transformer_blocks.*.norm1.linear": (16, 3072, 18_432),
    "transformer_blocks.*.norm1_context.linear": (16, 3072, 18_432),
    "single_transformer_blocks.*.norm.linear": (16, 3072, 9216),
    "norm_out.linear": (16, 3072, 6144),
}


@pytest.fixture(scope="module")
def flux(diffusers):
    """FLUX.1 as it is, but for two blocks of each kind."""
    with torch.device("meta"):
        return diffusers.FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)


def asked(tokens, **options):
    return auto_filter("tensorwise", tokens=tokens, device="H200", plan=None, **options)


def test_modulation_stays_in_bf16_and_the_others_follow_the_table(flux):
    wants_float8 = asked(IMAGES * PATCHES)
    inputs = flux_inputs(flux.config, images=IMAGES, patches=PATCHES, words=WORDS)
    wants_float8.check(flux, example_inputs=inputs)
    decisions = {(without_indices(fqn), decision) for fqn, decision in wants_float8.decisions.items()}
    assert {(kind, decision.m) for kind, decision in decisions if decision.convert} == set(CONVERTED.items())
    few = {(kind, decision.shape) for kind, decision in decisions if kind in MODULATION}
    assert few == {(kind, LinearShape(*shape)) for kind, shape in MODULATION.items()}
    for fqn, decision in wants_float8.decisions.items():
        alone = asked(decision.m)
        assert alone(nn.Linear(decision.k, decision.n, device="meta"), "linear") == decision.convert, fqn
    assert Counter(decision.rows_from for decision in wants_float8.decisions.values()) == {"observed": 50}


def test_without_inputs_modulation_is_doubted_as_it_would_be_converted(flux):
    wants_float8 = asked(IMAGES * PATCHES)
    found = wants_float8.check(flux)
    doubted = {finding.message.split(":")[0] for finding in found if finding.category is UnknownRowsWarning}
    assert set(MODULATION) <= doubted
    assert not set(CONVERTED) & doubted
    assert wants_float8.decisions["transformer_blocks.0.norm1.linear"].convert
