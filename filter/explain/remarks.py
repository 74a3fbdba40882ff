"""What an explanation has to say in words: which plan decides, what is doubtful, and why another choice looks faster.

In: an `Explanation`. Out: sentences, each with the command that settles it where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from fp8gate.filter.contract.recipes import RECIPES, Recipe
from fp8gate.filter.contract.shapes import TOKEN_TILE
from fp8gate.filter.contract.software_check import stale
from fp8gate.filter.decision.estimate import OF_ALIGNED
from fp8gate.filter.decision.shared_input import least_text
from fp8gate.filter.explain.explanation import BF16, LISTED, PLAN, TABLE, Choice, Explanation
from fp8gate.filter.locate.places import shown
from fp8gate.filter.policy.findings import OutsideGridWarning, StaleTableWarning

EVIDENCE = (
    "A layer near 1.0x gains little by itself and can slow its neighbours down inside a compiled block: in twelve "
    "blocks on an NVIDIA H200, fp8gate's default set took 0.4 % more time than the plan's (mean; worst 1.1 %), the set "
    "of all linears from 1.00x on 1.9 % (worst 7.8 %), from 1.05x on 0.8 % (worst 2.7 %)."
)
"""Source: `python benchmarks/plan_choices.py`, its second table, which a test compares."""


class _Doubt(NamedTuple):
    """A sentence, and what the command at its end needs for the casts: " --casts fp8gate", or nothing."""

    text: str
    option: str = ""


def remarks(explanation: Explanation) -> Iterator[str]:
    """The sentences about one explanation, the most important first."""
    plans = explanation.plans
    if plans:
        part = ", one rank's part, without communication" if plans.plans[0].tp > 1 else ""
        yield f"The plan decides, measured in the compiled block of {plans.model}{part}: {shown(plans.source)}"
        yield from (f"The filter takes {remark}." for remark in plans.remarks())
    if faster := _faster_by_sums(explanation):
        yield _why_behind(explanation, faster, is_brief=False)
    yield from _gain_with_casts(explanation)
    yield from _factors_for_tokens([explanation])
    yield from (f"{doubt.text}{doubt.option}" for doubt in _doubts(explanation))
    if plans is None and explanation.plan_command:
        yield f"No measured plan of this block decides. To measure one: {explanation.plan_command}"


def shared_remarks(explanations: Mapping[Recipe, Explanation]) -> Iterator[str]:
    """The sentences about several recipes side by side: why another choice looks faster, and every doubt once."""
    for recipe, explanation in explanations.items():
        if faster := _faster_by_sums(explanation):
            yield f"{recipe}: {_why_behind(explanation, faster, is_brief=True)}"
        yield from (f"{recipe}: {remark}" for remark in _gain_with_casts(explanation))
    yield from _factors_for_tokens(explanations.values())
    yield from _shared_doubts(explanations)
    if unplanned := [recipe for recipe, explanation in explanations.items() if not explanation.plans]:
        command = explanations[unplanned[0]].plan_command
        if command:
            which = f"No measured plan of this block decides with {', '.join(unplanned)}"
            yield f"{which}. To measure one: {command}"


def _shared_doubts(explanations: Mapping[Recipe, Explanation]) -> Iterator[str]:
    """Every doubt once. It begins with its recipes if others have another doubt of the same kind.

    Doubts that differ only by the casts that their command ends with are one doubt.
    """
    said: dict[str, dict[Recipe, str]] = {}  # the text of a doubt -> the option for the casts, by recipe
    for recipe, explanation in explanations.items():
        for doubt in _doubts(explanation):
            said.setdefault(doubt.text, {})[recipe] = doubt.option
    for text, options in said.items():
        kind, _, _ = text.partition(" ")
        others = [by for other, by in said.items() if other != text and other.startswith(f"{kind} ")]
        has_others = any(by.keys() - options.keys() for by in others)
        which = f"{', '.join(options)}: " if has_others else ""
        commands = ", and again with".join(sorted({*options.values()}))  # "", " --casts fp8gate", or both
        yield f"{which}{text}{commands}"


def _faster_by_sums(explanation: Explanation) -> Choice | None:
    """The choice whose predicted time is lowest, if it is below that of the filter's choice."""
    best = min(explanation.choices, key=lambda choice: choice.us)
    return best if best.us < explanation.chosen.us * (1 - 1e-9) else None


def _why_behind(explanation: Explanation, faster: Choice, *, is_brief: bool) -> str:
    chosen = explanation.chosen
    less = f"By the sum of single linears, {_in_words(faster)} takes {1 - faster.us / chosen.us:.1%} less time"
    if chosen.name == PLAN:
        missing = explanation.plans.missing if explanation.plans else ()
        return f"{less}. {_measured_instead(chosen, faster, missing)}"
    skipped = [layer for layer in faster.converted if layer not in chosen.converted and layer.fp8_us < layer.bf16_us]
    layers = ", ".join(f"{layer.linear.role} ({layer.by_table.speedup_text or 'no number'})" for layer in skipped)
    if not skipped:
        least = least_text(explanation.min_speedup)
        return f"{less}, as fp8gate converts from {least} on (--min-speedup), and so layers that lose by themselves."
    why = f"{'they are' if len(skipped) > 1 else 'it is'} {_threshold(explanation)}"
    sentence = f"{less}, as it also converts {layers}, which fp8gate leaves in bf16: {why}."
    return sentence if is_brief else f"{sentence} {EVIDENCE}"


def _measured_instead(chosen: Choice, faster: Choice, missing: Sequence[str]) -> str:
    if missing:
        return f"Inside the compiled block nothing was measured of {' and '.join(missing)} yet."
    if chosen.in_block is None:
        return "What is left of the plan's set was not measured inside the compiled block."
    gains = f"the plan's set runs at {chosen.in_block.speedup:.3f}x"
    if faster.name == BF16:
        return f"Inside the compiled block, where casts fuse with their neighbours, {gains}."
    measured = f"at {faster.in_block.speedup:.3f}x" if faster.in_block else "was not measured"
    other = f"{_in_words(faster)} {measured}"
    return f"Inside the compiled block, where casts fuse with their neighbours, {gains}, {other}."


def _in_words(choice: Choice) -> str:
    """The choice, in a sentence."""
    return {TABLE: "the table's set", PLAN: "the plan's set"}.get(choice.name, choice.name)


def _gain_with_casts(explanation: Explanation) -> Iterator[str]:
    """That other casts were measured as well, and what the block gains with them if a plan tells."""
    other = explanation.with_casts
    if other is None:
        return
    variant, in_block = other.table.variant, other.chosen.in_block
    gain = f", the block {in_block.speedup:.3f}x" if in_block else ""
    yield f"This was measured with {variant.casts}'s casts too{gain}:{variant.option}"


def _threshold(explanation: Explanation) -> str:
    below = f"below {least_text(explanation.min_speedup)} (--min-speedup)"
    if explanation.min_speedup is None and RECIPES[explanation.table.recipe].spares_value:
        return f"{below}, have no sure number, or would leave none of wq, wk and wv in bf16"
    return f"{below} or have no sure number"


def _factors_for_tokens(explanations: Iterable[Explanation]) -> Iterator[str]:
    """By what the speedups of each recipe are multiplied where the tokens are no multiple of 128, if they are."""
    tokens, factors = set(), {}
    for explanation in explanations:
        for layer in explanation.layers:
            factor = layer.by_table.unaligned
            if factor not in (None, 1.0):
                tokens.add(layer.shape.m)
                variant = explanation.table.variant
                factors[variant] = f"{variant} {factor:.2f}"
    if factors:
        fewest = min(tokens)
        more = math.ceil(fewest / TOKEN_TILE) * TOKEN_TILE
        yield (
            f"Float8 is slower with {fewest} tokens, no multiple of {TOKEN_TILE}, than with {more}. Speedups are "
            f"multiplied by a factor for that: {', '.join(factors.values())}."
        )


def _doubts(explanation: Explanation) -> Iterator[_Doubt]:
    """What makes the decisions less than certain, in one line a kind."""
    option = explanation.table.variant.option
    listed = "" if explanation.has_config else LISTED
    measure = f"To measure these shapes{listed}: {explanation.measure_command}"
    if far := [layer.linear.role for layer in explanation.layers if layer.is_far]:
        left = "Too far outside of the measured range, so left in bf16 and not in the sums"
        yield _Doubt(f"{left}: {', '.join(far)}. {measure}", option)
    outside = [layer.linear.role for layer in explanation.layers if layer.by_table.outside and not layer.is_far]
    if outside:
        border = "Outside the measured range, answered by the border and its trend"
        yield _Doubt(f"{border}: {', '.join(outside)}. {measure}", option)
    if unaligned := [layer.linear.role for layer in explanation.layers if layer.by_table.unaligned is None]:
        yield _Doubt(f"Answered from {OF_ALIGNED}: {', '.join(unaligned)}. {measure}", option)
    if differences := stale(explanation.table.software):
        device = explanation.table.device.name
        yield _Doubt(f"Measured with {differences}. To measure again, on {device}: fp8gate calibrate", option)
    for finding in explanation.findings:
        if finding.category not in (OutsideGridWarning, StaleTableWarning):
            yield _Doubt(finding.message)
