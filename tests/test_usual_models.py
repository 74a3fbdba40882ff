"""The bundled models' layers as points of a map: which roles share one, whole and divided."""

from __future__ import annotations

from fp8gate.calibrate.comparison.usual_models import placed_models, shown_models
from fp8gate.filter.contract.shapes import LinearShape


def placed(model):
    return {(layer.k, layer.n): (layer.roles, layer.tp) for layer in placed_models()[model]}


def test_roles_of_the_same_sizes_are_one_layer():
    assert placed("llama3-8b") == {
        (4096, 4096): (("wq", "wo"), 1),
        (4096, 1024): (("wk", "wv"), 1),
        (4096, 14336): (("w1", "w3"), 1),
        (14336, 4096): (("w2",), 1),
        (4096, 128256): (("output",), 1),
    }


def test_every_shown_model_has_its_layers_and_its_linears_by_name():
    assert [model.name for model in shown_models()] == list(placed_models())
    divided = next(model for model in shown_models() if model.name == "llama3-70b, TP 8")
    assert divided.shapes(1024)["model.layers.*.self_attn.o_proj"] == LinearShape(1024, 1024, 8192)


def test_what_is_usually_divided_is_there_whole_too():
    assert (8192, 1024) in placed("llama3-70b")
    assert placed("llama3-70b, TP 8")[8192, 1024] == (("wq",), 8)
    assert "llama3-8b, TP 8" not in placed_models()
