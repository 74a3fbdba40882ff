"""fp8gate.casts on and off: by a call, inside a context, by the environment, beside another pass."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from casts_graphs import FLOAT8, both, column, logged_by_casts, operand, operators_in, row, traced
from test_light_import import HEAVY, loaded_after
from torch import Tensor
from torch._inductor import config as inductor_config

from fp8gate import casts
from fp8gate.casts import graph_pass
from fp8gate.casts.graph_pass import CastPass
from fp8gate.filter.contract.errors import InputError


def passed() -> Any:
    return inductor_config.post_grad_custom_post_pass


@pytest.fixture
def _off_afterwards() -> Iterator[None]:
    with inductor_config.patch({"post_grad_custom_post_pass": None}):
        yield


@pytest.mark.usefixtures("_off_afterwards")
def test_it_is_off_until_it_is_turned_on():
    assert not casts.is_enabled()
    casts.enable()
    assert casts.is_enabled()
    turned_on = passed()
    casts.enable()
    assert passed() is turned_on


def test_a_context_turns_it_on_or_off_and_back():
    with casts.replaced():
        assert casts.is_enabled()
        turned_on = passed()
        with casts.replaced():
            assert passed() is turned_on
        with casts.not_replaced():
            assert passed() is None
            with casts.not_replaced(), casts.replaced():
                assert casts.is_enabled()
        assert passed() is turned_on
    assert not casts.is_enabled()
    made_while_off = casts.not_replaced()
    with casts.replaced(), made_while_off:
        assert not casts.is_enabled()
    for context in (casts.not_replaced, casts.replaced):
        with context():
            casts.enable()
            assert casts.is_enabled()
        assert not casts.is_enabled()


@pytest.mark.usefixtures("_off_afterwards")
def test_the_environment_turns_it_on(monkeypatch):
    for off in ({}, {"FP8GATE_CASTS": ""}, {"FP8GATE_CASTS": "0"}):
        assert not casts.enable_if_asked(off)
        assert not casts.is_enabled()
    with pytest.raises(InputError, match="FP8GATE_CASTS: expected 1 to replace casts, or 0; got 'yes'"):
        casts.enable_if_asked({"FP8GATE_CASTS": "yes"})
    assert not casts.is_enabled()
    monkeypatch.setenv("FP8GATE_CASTS", "1")
    assert casts.enable_if_asked()
    assert casts.is_enabled()
    assert casts.enable_if_asked()


def test_importing_and_asking_load_nothing_heavy():
    code = "from fp8gate import casts\nassert not casts.is_enabled()\nassert not casts.enable_if_asked({})\n"
    assert loaded_after(code) & HEAVY == set()


def test_another_pass_still_runs_first():
    seen = []
    graph = traced(both, operand())
    with inductor_config.patch({"post_grad_custom_post_pass": lambda graph: seen.append(str(graph))}):
        with graph_pass.replaced(least_elements=0):
            passed()(graph.graph)
            assert passed().uuid() is None  # as the other has none
        assert len(seen) == 1
    assert "cast_both_forms" not in seen[0]
    assert operators_in(graph) == ["cast_both_forms"]


def test_passes_of_other_kinds_are_refused():
    class CustomInferenceAwareGraphPass:
        """As torch 2.13 names it; 2.11 has none."""

        def __call__(self, graph: Any, is_inference: bool) -> None: ...

    aware = CustomInferenceAwareGraphPass()
    for other in (aware, [aware]):
        with (
            inductor_config.patch({"post_grad_custom_post_pass": other}),
            pytest.raises(InputError, match=r"expected none, or one pass that takes a graph .* Set it to None"),
            casts.replaced(),
        ):
            pass


def test_another_pass_still_runs_where_casts_are_not_replaced():
    def other(graph: Any) -> None: ...

    with inductor_config.patch({"post_grad_custom_post_pass": other}):
        with casts.replaced():
            assert casts.is_enabled()
            with casts.not_replaced():
                assert passed() is other
            assert casts.is_enabled()
        assert passed() is other


def test_what_a_graph_depends_on_is_in_its_key():
    made = [
        CastPass(least_elements=least, before=before)
        for least in (0, 1)
        for before in (None, CastPass(least_elements=2, before=None))
    ]
    keys = [one.uuid() for one in made]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert keys == [one.uuid() for one in made]


def test_a_line_a_graph_is_logged_by_casts(caplog):
    graph = traced(lambda x: (*both(x), *row(2 * x), *column(x, eps=0.0)), operand())
    with caplog.at_level(logging.INFO, "fp8gate.casts"), graph_pass.replaced(least_elements=0):
        passed()(graph.graph)
        passed()(traced(torch.relu, operand()).graph)  # without casts, there is nothing to say
    assert logged_by_casts(caplog) == [
        "2 of 4 float8 casts replaced; left to Inductor: 1 along rows alone, which it does well; "
        "1 unknown: expected clamp_min(..., 1e-12), found clamp_min(..., 0.0)"
    ]


def test_a_graph_without_any_replaced_cast_is_a_warning_if_one_is_unknown(caplog):
    def cast_at_once(x: Tensor) -> Tensor:
        return (x.float() * (448.0 / x.abs().max().double().clamp(min=1e-12)).float()).clamp(-448.0, 448.0).to(FLOAT8)

    functions = (row, lambda x: column(x, eps=0.0), lambda x: (*both(x), *column(2 * x, eps=0.0)), cast_at_once)
    with caplog.at_level(logging.INFO, "fp8gate.casts"), graph_pass.replaced(least_elements=0):
        for one in functions:
            passed()(traced(one, operand()).graph)
    levels = [record.levelname for record in caplog.records if record.name.startswith("fp8gate.casts")]
    assert levels == ["INFO", "WARNING", "INFO", "INFO"]
