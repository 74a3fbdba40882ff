"""The numeric check: every arm passes it, and no wrong result does."""

from __future__ import annotations

import math

import pytest
import torch

from fp8gate.calibrate.arms.compilation import eager_linear
from fp8gate.calibrate.arms.linear import Operands
from fp8gate.calibrate.arms.numerics import MAX_RELATIVE_ERROR, References, acceptable
from fp8gate.calibrate.device.timer import Results
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.shapes import LinearShape

CPU = torch.device("cpu")
RESULTS = ("output", "grad_x", "grad_weight")
ROW_BLOCKS_AND_A_REST = LinearShape(272, 144, 160)


def computed(recipe, shape=ROW_BLOCKS_AND_A_REST):
    """Operands, and what an arm really computes of them."""
    torch.manual_seed(0)
    operands = Operands.random(shape, CPU)
    arm = eager_linear(recipe, shape).over(operands)
    output = arm.forward()
    return operands, Results(output.detach(), arm.backward(output))


def relative_errors(results, operands):
    return References(operands).relative_errors(results)


def with_one(value):
    def damage(tensor):
        damaged = tensor.clone()
        damaged[3, 5] = value
        return damaged

    return damage


def damaged(results, name, damage):
    output, *gradients = (
        damage(getattr(results, field)) if field == name else getattr(results, field) for field in RESULTS
    )
    return Results(output, tuple(gradients))


def test_bf16_has_only_its_rounding_error():
    operands, results = computed(None)
    errors = relative_errors(results, operands)
    assert list(errors) == list(RESULTS)
    assert all(0 < error < 0.005 for error in errors.values())
    assert acceptable(errors)


@pytest.mark.parametrize("recipe", RECIPES)
def test_float8_is_acceptable_and_visibly_float8(recipe):
    operands, results = computed(recipe)
    errors = relative_errors(results, operands)
    assert 0.02 < errors["output"] < 0.1  # e4m3 keeps 3 bits of the mantissa; bf16 has an error below 0.005
    assert 0.02 < errors["grad_x"] < 0.1
    assert acceptable(errors)


def test_gw_hp_keeps_the_weight_gradient_in_bf16():
    assert relative_errors(*reversed(computed("rowwise_with_gw_hp")))["grad_weight"] < 0.005
    assert relative_errors(*reversed(computed("rowwise")))["grad_weight"] > 0.02


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        pytest.param(lambda t: t * 1.5, 0.5, id="scaled"),
        pytest.param(torch.zeros_like, 1.0, id="zeroed"),
        pytest.param(lambda t: t.t(), math.sqrt(2), id="transposed"),
        pytest.param(lambda t: t.roll(1, 0), math.sqrt(2), id="rows shifted"),
    ],
)
def test_a_wrong_result_is_not_acceptable(name, damage, expected):
    operands, right = computed(None, LinearShape(256, 256, 256))
    errors = relative_errors(damaged(right, name, damage), operands)
    assert errors[name] == pytest.approx(expected, abs=0.15)
    assert not acceptable(errors)
    assert acceptable({other: error for other, error in errors.items() if other != name})


@pytest.mark.parametrize("rows", [1024, 65536])
def test_no_tile_of_128_rows_goes_unseen(rows):
    operands, right = computed(None, LinearShape(rows, 16, 16))
    for first_row in range(0, rows, rows // 8):
        damaged_output = right.output.clone()
        damaged_output[first_row : first_row + 128] = 0
        errors = relative_errors(damaged(right, "output", lambda _, new=damaged_output: new), operands)
        assert errors["output"] == pytest.approx(math.sqrt(128 / rows), rel=0.5)


def test_of_a_small_result_every_row_is_compared():
    def without_first_rows(tensor):
        return torch.cat([torch.zeros_like(tensor[:4]), tensor[4:]])

    operands, right = computed(None, LinearShape(64, 64, 64))
    for seed in range(10):
        torch.manual_seed(seed)
        errors = relative_errors(damaged(right, "output", without_first_rows), operands)
        assert errors["output"] == pytest.approx(math.sqrt(4 / 64), rel=0.2)


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_element_that_is_not_finite_is_not_acceptable(name, value):
    operands, right = computed("tensorwise")
    errors = relative_errors(damaged(right, name, with_one(value)), operands)
    assert math.isnan(errors[name])
    assert not acceptable(errors)


@pytest.mark.parametrize(
    ("error", "is_acceptable"),
    [(0.0, True), (MAX_RELATIVE_ERROR, True), (MAX_RELATIVE_ERROR + 0.001, False), (math.nan, False)],
)
def test_every_error_counts(error, is_acceptable):
    assert acceptable({"output": 0.01, "grad_x": error, "grad_weight": 0.01}) is is_acceptable


def test_the_operands_may_be_gone_by_the_time_a_result_is_judged():
    operands, results = computed("rowwise")
    references = References(operands)
    before = references.relative_errors(results)
    operands.free()
    assert references.relative_errors(results) == before
