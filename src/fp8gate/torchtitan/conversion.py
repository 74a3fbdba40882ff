"""Convert the linears of a model's config that win, as torchtitan's own converter would, and log what was decided.

In: a `Run` and the settings. Out: the model's config, changed in place, and a report in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch._inductor.config
import torch.distributed
from torchao.float8 import convert_to_float8_training
from torchtitan.components.quantization.float8 import Float8Linear, Float8LinearConverter
from torchtitan.models.common.moe import GroupedExperts

from fp8gate import casts
from fp8gate.filter.auto_filter import auto_filter
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.names import is_head, without_indices
from fp8gate.filter.decision.measured_settings import casts_enabled
from fp8gate.filter.layer_filter import AutoFilter
from fp8gate.filter.model.parallel import Parallel
from fp8gate.torchtitan.gate_settings import NAME, GateSettings
from fp8gate.torchtitan.linear_configs import LinearPlace, in_float8, linear_places, plain, sharding_plan, why_left
from fp8gate.torchtitan.run import Run

logger = logging.getLogger(__name__)

_TITAN_CONVERTER = "torchtitan's Float8LinearConverter"
_WITHOUT_IT = f"take {_TITAN_CONVERTER} out of the config"


def convert_model(run: Run, settings: GateSettings) -> None:
    """Convert what wins. Everything is decided, and compared among ranks, before a config is changed.

    Raises InputError for settings that are not the run's, for a model without linears, and if torchtitan's converter
    has converted what is not to be converted.
    """
    run.require_same(settings)
    casts_before = torch._inductor.config.emulate_precision_casts
    is_converted = False
    try:
        is_converted = _convert_winners(run, settings)
    finally:
        if not is_converted:  # a model in bf16 is compiled as it is without this override
            torch._inductor.config.emulate_precision_casts = casts_before


def _convert_winners(run: Run, settings: GateSettings) -> bool:
    """Whether any linear is in float8 then."""
    places = linear_places(run.model)
    if not places:
        raise InputError(
            f"{NAME}: {type(run.model).__qualname__} has no Linear.Config: its linears are built elsewhere"
        )
    _require_known_float8(places)
    left = {place.fqn: why for place in places if (why := why_left(place, asks_head=settings.head))}
    asked = [place for place in places if place.fqn not in left]
    _require_head_rows(asked, settings)
    torchao_config = _torchao_config(run, settings)
    if settings.casts == "fp8gate":
        casts.enable()
    wants_float8 = _filter(run, settings, asked, left, torchao_config)
    wants_float8.check([(place.fqn, plain(place.config)) for place in asked])
    _agree(wants_float8)
    wanted = {fqn for fqn, decision in wants_float8.decisions.items() if decision.convert}
    converted = [place for place in places if place.is_float8]
    if converted and not settings.replace:
        _require_wanted(converted, wanted, torchao_config)
    else:
        _convert(places, wanted, torchao_config)
    # triton-lang/triton#11111 corrupts float8 that is stored transposed. torchao's workaround runs in this function,
    # which torchtitan never calls. An Identity has nothing to convert.
    convert_to_float8_training(torch.nn.Identity())
    remarks = (*_kept(converted, wanted, settings), *_unseen(run, settings, left))
    logger.info("\n".join((f"{NAME}:", wants_float8.report(), *remarks)))
    return bool(wanted)


def _require_known_float8(places: Sequence[LinearPlace]) -> None:
    """Raises InputError for float8 that another converter has changed: nothing here could take it back."""
    for place in places:
        if isinstance(place.config, Float8Linear.Config) and not place.is_float8:
            raise InputError(f"{NAME}: {place.fqn} is a {type(place.config).__qualname__} already; {_WITHOUT_IT}")


def _require_head_rows(asked: Sequence[LinearPlace], settings: GateSettings) -> None:
    for place in asked:
        if is_head(place.fqn) and not any(fnmatchcase(place.fqn, pattern) for pattern in settings.rows):
            raise InputError(
                f"{NAME}: rows: expected those of {place.fqn}, as head is true: tokens / num_chunks if the loss is a "
                "ChunkedLossWrapper, else the tokens"
            )


def _torchao_config(run: Run, settings: GateSettings) -> object:
    """torchao's config of the recipe. torchtitan's converter makes it, and sets what Inductor needs for the recipe."""
    converter = Float8LinearConverter.Config(
        recipe_name=settings.recipe, emulate=settings.emulate, model_compile_enabled=run.is_compiled
    )
    try:
        return converter.build().torchao_config
    except ValueError as error:
        if settings.emulate:
            raise InputError(f'{NAME}: "emulate": true: expected a run without compile.enable') from error
        reason = "without compile.enable, to test on such a machine" if run.is_compiled else "to test on such a machine"
        raise InputError(f'{NAME}: this machine computes no float8; "emulate": true, {reason}: {error}') from error


def _filter(
    run: Run, settings: GateSettings, asked: Sequence[LinearPlace], left: dict[str, str], torchao_config: object
) -> AutoFilter:
    names = [place.fqn for place in asked]
    filter_fqns = [  # without those that name only what is left alone anyway
        pattern
        for pattern in settings.filter_fqns
        if any(pattern in fqn for fqn in names) or not any(pattern in fqn for fqn in left)
    ]
    return auto_filter(
        settings.recipe,
        tokens=run.tokens,
        rows=settings.rows,
        float8_config=torchao_config,
        compiled=run.is_compiled,
        device=settings.device,
        filter_fqns=filter_fqns,
        min_speedup=settings.min_speedup,
        lookup=settings.lookup,
        tables=settings.tables,
        plan=settings.plan,
        casts=settings.casts,
        parallel=Parallel(tp=run.tp, cp=run.cp, plan=sharding_plan(asked)),
        recompute=run.recompute_for(settings),
        strict=settings.strict,
    )


def _agree(wants_float8: AutoFilter) -> None:
    """Compare the decisions of all ranks. torchtitan's dry runs have ranks that are no processes."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if is_distributed and torch.distributed.get_backend() != "fake":
        wants_float8.agree()


def _convert(places: Sequence[LinearPlace], wanted: set[str], torchao_config: object) -> None:
    for place in places:
        if place.fqn in wanted:
            place.replace(in_float8(plain(place.config), torchao_config))
        elif place.is_float8:
            place.replace(plain(place.config))


def _require_wanted(converted: Sequence[LinearPlace], wanted: set[str], torchao_config: object) -> None:
    """Raises InputError if torchtitan's converter has converted a linear that stays in bf16, or by another recipe."""
    fix = f'{_WITHOUT_IT}, or give "replace": true to decide anew about what it converted'
    if refused := [place.fqn for place in converted if place.fqn not in wanted]:
        raise InputError(
            f"{NAME}: {_TITAN_CONVERTER} has converted {len(refused)} linears that are to stay in bf16: "
            f"{_listed(refused)}; {fix}"
        )
    if any(place.config._torchao_config != torchao_config for place in converted):
        raise InputError(f"{NAME}: recipe: {_TITAN_CONVERTER} has converted by another one; {fix}")


def _kept(converted: Sequence[LinearPlace], wanted: set[str], settings: GateSettings) -> Iterator[str]:
    """What became of the linears that torchtitan's converter had converted, and had left."""
    if not converted:
        return
    names = {place.fqn for place in converted}
    if settings.replace:
        yield f"{_TITAN_CONVERTER} had converted {len(names)} linears; {len(names - wanted)} of them are in bf16 again"
        return
    yield f"{_TITAN_CONVERTER} had converted {len(names)} linears, and nothing else is converted"
    if others := [fqn for fqn in wanted if fqn not in names]:
        yield f"left in bf16, as that converter left them, though they win: {_listed(others)}"


def _unseen(run: Run, settings: GateSettings, left: dict[str, str]) -> Iterator[str]:
    """What nothing was asked about, and what no table was measured with."""
    reasons: dict[str, list[str]] = {}
    for fqn, why in left.items():
        reasons.setdefault(why, []).append(fqn)
    for why, names in reasons.items():
        yield f"not asked about: {_listed(names)}: {why}"
    if experts := [fqn for fqn, *_ in run.model.traverse(GroupedExperts.Config)]:
        yield f"not asked about: {_listed(experts)}: grouped experts have converters of their own"
    if run.recompute is None:
        other = {"none": "full", "full": "none"}[taken := run.recompute_for(settings)]
        yield (
            f"{run.checkpointing} runs a part of the forward twice, which was not measured: decided by "
            f'"recompute": "{taken}"; the other choice is "{other}"'
        )
    if casts_enabled(settings.recipe) == "fp8gate":
        yield "fp8gate's casts are on"
    if settings.head and run.is_compiled:
        yield "the head is not compiled, and tables are of compiled linears: its casts cost more than they say"
    if run.has_async_tp:
        yield "compile.enable_async_tensor_parallel was not measured: products were timed without collectives"


def _listed(names: Any) -> str:
    return ", ".join(dict.fromkeys(map(without_indices, names)))
