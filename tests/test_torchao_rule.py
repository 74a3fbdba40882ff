"""fp8gate's copy of torchao's rule, compared with the real one."""

from __future__ import annotations

import itertools

import pytest
from torch import nn
from torchao.float8.float8_linear_utils import _auto_filter_for_recipe

from fp8gate.filter.decision.torchao_rule import torchao_converts

SIZES = [16, 100, 512, 1000, 1008, 1024, 1032, 1040, 2032, 2048, 2064, 4080, 4096, 4112, 4100, 8192, 16384]
"""Sizes around each of the rule's limits, and some that 16 does not divide."""


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_rule_agrees_with_torchao(recipe):
    real = _auto_filter_for_recipe(recipe, filter_fqns=[])
    grid = list(itertools.product(SIZES, SIZES))
    expected = {(k, n): real(nn.Linear(k, n, bias=False, device="meta"), "w1") for k, n in grid}
    assert {(k, n): torchao_converts(recipe, in_features=k, out_features=n) for k, n in grid} == expected
    assert set(expected.values()) == {True, False}


def test_recipe_without_a_rule_has_no_answer():
    with pytest.raises(NotImplementedError):
        _auto_filter_for_recipe("rowwise_with_gw_hp", filter_fqns=[])
    assert torchao_converts("rowwise_with_gw_hp", in_features=8192, out_features=8192) is None
    assert torchao_converts("rowwise", in_features=8192, out_features=8192) is True
