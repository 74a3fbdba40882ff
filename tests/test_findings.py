"""Warnings and errors about answers that are less than certain: only with cause, and as the policies ask."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import msgspec
import pytest
import torch
from builders import SOFTWARE_HERE, make_point, make_table, write_file
from plans import CANDIDATES, make_plan
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear

from fp8gate import (
    AmbiguousPointWarning,
    FilterWarning,
    Finding,
    IncompleteTableWarning,
    MissingPointWarning,
    NothingConvertedWarning,
    NotPlainLinearWarning,
    OutsideGridWarning,
    Parallel,
    PlanMismatchWarning,
    StaleTableWarning,
    UnknownRowsWarning,
    UnknownShardWarning,
    UnmatchedPatternWarning,
    UnmeasuredSettingWarning,
    auto_filter,
)
from fp8gate.filter.contract import software_check as stale_module
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.table import Incomplete

TOKENS = 32
WINNER, LOSER, AMBIGUOUS, MISSING, OUTSIDE = (64, 128), (128, 64), (64, 64), (128, 128), (64, 256)
TABLE = make_table(
    make_point(TOKENS, *WINNER, 1.5),
    make_point(TOKENS, *LOSER, 0.5),
    make_point(TOKENS, *AMBIGUOUS, 2.5, status="ambiguous", spread=3.0),
    make_point(TOKENS, *MISSING, status="out_of_memory"),
)

PLAN_OF_W1 = make_plan(
    shapes={"w1": (TOKENS, *WINNER)},
    indivisible=(),
    table=None,
    torchao=None,
    convert=("w1",),
    candidates=(CANDIDATES[0], msgspec.structs.replace(CANDIDATES[1], convert=("w1",))),
)


@dataclass(frozen=True)
class LinearConfig:
    in_features: int
    out_features: int


@pytest.fixture(autouse=True)
def driver_file(tmp_path, monkeypatch):
    """The file in which NVIDIA's driver would state its version. It does not exist."""
    path = tmp_path / "version"
    monkeypatch.setattr(stale_module, "DRIVER_VERSION", path)
    return path


@pytest.fixture
def make_filter(tmp_path):
    def make(*, software=None, incomplete=None, **settings):
        software = msgspec.structs.replace(SOFTWARE_HERE, **(software or {}))
        table = msgspec.structs.replace(TABLE, software=software, incomplete=incomplete)
        path = write_file(table, tmp_path / "t.yaml")
        return auto_filter("rowwise", **{"tokens": TOKENS, "tables": path, **settings})

    return make


def pairs(*layers):
    """Layers with names: w1, w2, ... for a size; a name and a size, or a name and a module, as they are."""
    named = [layer if isinstance(layer[0], str) else (f"w{i}", layer) for i, layer in enumerate(layers, start=1)]
    return [(name, LinearConfig(*layer) if isinstance(layer, tuple) else layer) for name, layer in named]


def warned_of(ask):
    """The warnings that `ask()` gives, and its result."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer = ask()
    return [(w.category, str(w.message)) for w in caught], answer


# --- every category --------------------------------------------------------------------------------------------

# category, its policy, settings and layers that give cause, the message, settings and layers that give none
CASES = {
    "stale": (
        StaleTableWarning,
        "on_stale",
        ({"software": {"torchao": "0.0.1"}}, [WINNER]),
        r".*t\.yaml was measured with torchao 0\.0\.1, here [\d.]+; to measure again: fp8gate calibrate",
        ({"software": {"torchao": f"{SOFTWARE_HERE.torchao}+cu999"}}, [WINNER]),
    ),
    "incomplete": (
        IncompleteTableWarning,
        "on_incomplete",
        ({"incomplete": Incomplete(measured=4, of=9)}, [WINNER]),
        r".*t\.yaml is incomplete, its sweep was stopped after 4 of 9 measurements; to complete it, run on NVIDIA H200 "
        r"with the options that it was begun with: fp8gate calibrate --out .*",
        ({}, [WINNER]),
    ),
    "outside": (
        OutsideGridWarning,
        "on_outside",
        ({}, [WINNER, OUTSIDE]),
        r"w2, \(32, 64, 256\): 0\.90x, below 1\.05x, interpolated, outside the measured range",
        ({}, [WINNER, (80, 96), LOSER]),
    ),
    "ambiguous": (
        AmbiguousPointWarning,
        "on_ambiguous",
        ({}, [WINNER, AMBIGUOUS]),
        r"w2, \(32, 64, 64\): 2\.50x, measured, ambiguous, bounds 0\.83 to 7\.50 within one run",
        ({}, [WINNER, (64, 112)]),
    ),
    "missing": (
        MissingPointWarning,
        "on_missing",
        ({}, [WINNER, MISSING]),
        r"w2, \(32, 128, 128\): 0\.50x, below 1\.05x, nearest \(32, 128, 64\), a nearer point is out_of_memory",
        ({}, [WINNER, (80, 112)]),
    ),
    "unknown shard": (
        UnknownShardWarning,
        "on_unknown_shard",
        ({"parallel": Parallel(tp=2, plan={"w1": "colwise"})}, [(64, 256), WINNER]),
        r"w2: no pattern of the parallel plan names it; taken as whole on every rank",
        ({"parallel": Parallel(tp=2, plan={"w1": "colwise", "w2": "replicated"})}, [(64, 256), WINNER]),
    ),
    "unknown rows": (
        UnknownRowsWarning,
        "on_unknown_rows",
        ({}, [("layers.0.experts.1.w1", WINNER)]),
        r"layers\.\*\.experts\.\*\.w1: an expert sees only the tokens that are routed to it; taken as 32, all tokens; "
        r"say rows=\{'layers\.\*\.experts\.\*\.w1': ROWS\}",
        ({"rows": {"*.experts.*": 32}}, [("layers.0.experts.1.w1", WINNER)]),
    ),
    "not plain": (
        NotPlainLinearWarning,
        "on_not_plain",
        ({}, [WINNER, ("attention.out_proj", nn.MultiheadAttention(64, 2).out_proj)]),
        r"attention\.out_proj: nn\.MultiheadAttention reads its weight and never calls it; left in bf16",
        ({"filter_fqns": ["out_proj"]}, [WINNER, ("attention.out_proj", nn.MultiheadAttention(64, 2).out_proj)]),
    ),
    "an unmeasured setting": (
        UnmeasuredSettingWarning,
        "on_unmeasured",
        ({"float8_config": replace(Float8LinearConfig.from_recipe_name("rowwise"), pad_inner_dim=True)}, [WINNER]),
        r"float8_config\.pad_inner_dim is True, measured was False: padding adds copies, .*",
        ({"float8_config": Float8LinearConfig.from_recipe_name("rowwise")}, [WINNER]),
    ),
    "emulated float8, of other kernels and not compiled": (
        UnmeasuredSettingWarning,
        "on_unmeasured",
        ({"float8_config": Float8LinearConfig(emulate=True, pad_inner_dim=True), "compiled": False}, [WINNER]),
        r"float8_config\.emulate is True: float8 is computed in float32, to test, and gains nothing",
        ({"float8_config": Float8LinearConfig.from_recipe_name("rowwise")}, [WINNER]),
    ),
    "a plan of other layers": (
        PlanMismatchWarning,
        "on_plan",
        ({"plan": make_plan()}, [WINNER]),
        r"of tiny: \$\.shapes: no linear has any of its roles, such as self_attn\.q_proj",
        ({"plan": PLAN_OF_W1}, [WINNER]),
    ),
    "unmatched name": (
        UnmatchedPatternWarning,
        "on_unmatched",
        ({"filter_fqns": ["w2", "mlp"]}, [WINNER, WINNER]),
        r"filter_fqns: 'mlp' is in no linear's name",
        ({"filter_fqns": ["w2"]}, [WINNER, WINNER]),
    ),
    "unmatched pattern of the plan": (
        UnmatchedPatternWarning,
        "on_unmatched",
        ({"parallel": Parallel(tp=2, plan={"w1": "colwise", "w?.proj": "rowwise"})}, [(64, 256)]),
        r"parallel\.plan: w\?\.proj matched no linear",
        ({"parallel": Parallel(tp=2, plan={"w?": "colwise", "norm": "replicated"})}, [(64, 256)]),
    ),
    "nothing converted": (
        NothingConvertedWarning,
        "on_nothing",
        ({}, [LOSER, LOSER]),
        r"none of 2 linears is converted to float8",
        ({}, [LOSER, WINNER]),
    ),
}
every_case = pytest.mark.parametrize(("category", "policy", "cause", "message", "no_cause"), CASES.values(), ids=CASES)


def test_every_category_has_a_case():
    assert {category for category, *_ in CASES.values()} == set(FilterWarning.__subclasses__())


@every_case
def test_cause_is_warned_of_and_nothing_else(make_filter, category, policy, cause, message, no_cause):
    settings, layers = cause
    [(warned, text)], findings = warned_of(lambda: make_filter(**settings).check(pairs(*layers)))
    assert warned is category
    with pytest.raises(category, match=f"^{message}$"):
        raise category(text)
    assert findings == [Finding(category, text)]


@every_case
@pytest.mark.parametrize("strict", [False, True])
def test_without_cause_it_is_quiet(make_filter, category, policy, cause, message, no_cause, strict):
    settings, layers = no_cause
    assert warned_of(lambda: make_filter(strict=strict, **settings).check(pairs(*layers))) == ([], [])


@every_case
@pytest.mark.parametrize("strict", [False, True])
def test_each_can_be_ignored(make_filter, category, policy, cause, message, no_cause, strict):
    settings, layers = cause
    asked = make_filter(strict=strict, **settings, **{policy: "ignore"})
    assert warned_of(lambda: asked.check(pairs(*layers))) == ([], [])


@every_case
@pytest.mark.parametrize("as_error", ["strict", "its policy"])
def test_each_can_be_an_error(make_filter, category, policy, cause, message, no_cause, as_error):
    settings, layers = cause
    policies = {"strict": True} if as_error == "strict" else {policy: "error"}
    with pytest.raises(category, match=f"^{message}$"):
        make_filter(**settings, **policies).check(pairs(*layers))


@every_case
def test_policy_comes_before_strict(make_filter, category, policy, cause, message, no_cause):
    settings, layers = cause
    ((warned, _),), findings = warned_of(
        lambda: make_filter(strict=True, **settings, **{policy: "warn"}).check(pairs(*layers))
    )
    assert warned is category
    assert len(findings) == 1


@every_case
def test_error_of_one_leaves_the_others_warnings(make_filter, category, policy, cause, message, no_cause):
    settings, layers = cause
    others = {p: "error" for _, p, *_ in CASES.values() if p != policy}
    ((warned, _),), _ = warned_of(lambda: make_filter(**settings, **others).check(pairs(*layers)))
    assert warned is category


@pytest.mark.parametrize("name", sorted({case[1] for case in CASES.values()}))
@pytest.mark.parametrize("policy", ["raise", "", True])
def test_bad_policy_is_named(make_filter, name, policy):
    with pytest.raises(InputError, match=f"^{name}: expected one of ignore, warn, error; got {policy!r}$"):
        make_filter(**{name: policy})


@pytest.mark.parametrize("kind", ["Kernel Module ", "Open Kernel Module for x86_64"])
@pytest.mark.parametrize(
    ("measured", "here", "difference"),
    [
        ("580.159.04", "580.159.04", None),
        ("580.159.04", "575.57.08", "driver 580.159.04, here 575.57.08"),
        ("550.54", "580.65.06", "driver 550.54, here 580.65.06"),
        (None, "580.65.06", None),
    ],
)
def test_driver_is_compared_with_the_one_here(make_filter, driver_file, kind, measured, here, difference):
    driver_file.write_text(
        f"NVRM version: NVIDIA UNIX {kind}  {here}  Release Build\nGCC version:  gcc version 12.3.0\n"
    )
    warned, _ = warned_of(lambda: make_filter(software={"driver": measured}))
    assert [text.partition("with ")[2].partition(";")[0] for _, text in warned] == ([difference] if difference else [])


@pytest.mark.parametrize("content", [None, "", "no driver 1.2 stated here\n"])
def test_driver_that_cannot_be_asked_is_no_difference(make_filter, driver_file, content):
    if content is not None:
        driver_file.write_text(content)
    assert warned_of(lambda: make_filter(software={"driver": "580.159.04"}).decisions) == ([], {})


@pytest.mark.parametrize("status", ["failed", "out_of_memory", "unstable"])
def test_every_kind_of_gap_is_missing(tmp_path, status):
    table = make_table(make_point(TOKENS, *WINNER, 1.5), make_point(TOKENS, *LOSER, status=status))
    asked = auto_filter("rowwise", tokens=TOKENS, tables=write_file(table, tmp_path / "t.yaml"), on_outside="ignore")
    with pytest.warns(MissingPointWarning, match=f"a nearer point is {status}"):
        asked(LinearConfig(*LOSER), "w2")


def settings_found(recipe="rowwise", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wants_float8 = auto_filter(recipe, tokens=8192, device="H200", on_stale="ignore", **options)
    return [finding.message for finding in wants_float8.examine()[:-1]]


def test_every_setting_that_was_not_measured_is_named():
    usual = Float8LinearConfig.from_recipe_name("tensorwise")
    odd = replace(usual, enable_fsdp_float8_all_gather=True, force_recompute_fp8_weight_in_bwd=True)
    assert [message.split(" ")[0] for message in settings_found("tensorwise", float8_config=odd)] == [
        "float8_config.enable_fsdp_float8_all_gather",
        "float8_config.force_recompute_fp8_weight_in_bwd",
    ]
    assert settings_found("tensorwise", float8_config=usual) == settings_found("tensorwise") == []
    assert settings_found(compiled=False)[0].startswith("compiled=False: what was measured ran under torch.compile")


def test_the_config_of_another_recipe_is_found():
    found = settings_found("rowwise", float8_config=Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp"))
    assert "float8_config.cast_config_grad_output_for_grad_weight" in [message.split(" ")[0] for message in found]


def test_what_is_no_config_is_refused():
    with pytest.raises(InputError, match=r"^float8_config: expected torchao's Float8LinearConfig; got dict$"):
        settings_found(float8_config={})


# --- when it is said -------------------------------------------------------------------------------------------


def test_layers_are_spoken_of_when_they_are_asked_about(make_filter):
    asked = make_filter(filter_fqns=["mlp"])
    warned, answer = warned_of(lambda: asked(nn.Linear(*OUTSIDE), "w1"))
    assert (answer, [category for category, _ in warned]) == (False, [OutsideGridWarning])
    assert warned_of(lambda: asked(nn.Linear(*WINNER), "w2")) == ([], True)


def test_what_only_the_whole_model_tells_waits_for_check(make_filter):
    asked = make_filter(filter_fqns=["mlp"], parallel=Parallel(plan={"w9": "colwise"}))
    assert warned_of(lambda: asked(nn.Linear(*LOSER), "w1")) == ([], False)
    warned, _ = warned_of(asked.check)
    assert [category for category, _ in warned] == [
        UnmatchedPatternWarning,
        UnmatchedPatternWarning,
        NothingConvertedWarning,
    ]


def test_each_finding_is_warned_of_once_and_told_again(make_filter):
    asked = make_filter(filter_fqns=["mlp"])
    layers = pairs(OUTSIDE, OUTSIDE, WINNER)
    warned, findings = warned_of(lambda: asked.check(layers))
    assert [(category, text[:2]) for category, text in warned] == [
        (OutsideGridWarning, "w1"),
        (UnmatchedPatternWarning, "fi"),
    ]
    assert warned_of(lambda: [asked(layer, fqn) for fqn, layer in layers]) == ([], [False, False, True])
    assert warned_of(lambda: asked.check(layers)) == ([], findings)
    assert warned_of(asked.check) == ([], findings)
    other = pairs(OUTSIDE, OUTSIDE, WINNER, (64, 512))
    assert len(warned_of(lambda: asked.check(other))[0]) == 1


@pytest.mark.parametrize(
    "ask",
    [lambda asked: asked(LinearConfig(*OUTSIDE), "w1"), lambda asked: asked.check(pairs(OUTSIDE))],
    ids=["a question", "check"],
)
def test_error_is_raised_as_often_as_it_is_asked_for(make_filter, ask):
    """Running a notebook's cell a second time must not get past the error."""
    asked = make_filter(on_outside="error")
    for _ in range(2):
        with pytest.raises(OutsideGridWarning, match=r"^w1, \(32, 64, 256\)"):
            ask(asked)


def test_check_tells_of_what_is_so_now(make_filter):
    asked = make_filter()
    with pytest.warns(NothingConvertedWarning):
        assert len(asked.check(pairs(LOSER))) == 1
    assert asked.check(pairs(WINNER)) == []


def test_check_before_any_question_finds_nothing_converted(make_filter):
    with pytest.warns(NothingConvertedWarning, match=r"^none of 0 linears is converted to float8$"):
        make_filter().check()


def test_check_goes_by_what_was_asked_so_far(make_filter):
    asked = make_filter(filter_fqns=["w2"])
    asked(LinearConfig(*WINNER), "w1")
    with pytest.warns(UnmatchedPatternWarning):
        asked.check()
    asked = make_filter(filter_fqns=["w2"])
    for fqn, layer in pairs(WINNER, LOSER):
        asked(layer, fqn)
    assert asked.check() == []


@pytest.mark.parametrize(
    "speak",
    [
        lambda make: make(software={"torch": "0.0.1"}),
        lambda make: make()(LinearConfig(*OUTSIDE), "w1"),
        lambda make: make().check(pairs(OUTSIDE)),
        lambda make: make().check(),
    ],
    ids=["auto_filter", "a question", "check of a model", "check"],
)
def test_warning_points_to_the_caller(make_filter, speak):
    with pytest.warns(FilterWarning) as caught:
        speak(make_filter)
    assert caught[0].filename == __file__


# --- check before any conversion -------------------------------------------------------------------------------


class Experts(nn.Module):
    """Grouped experts, as models have them: one parameter for all."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(4, 128, 64))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(*WINNER)
        self.moe = nn.ModuleDict(
            {"router": nn.Linear(64, 8), "experts": Experts(), "shared_expert": nn.Linear(*WINNER)}
        )


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(128, 64)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.ambiguous, self.missing = nn.Linear(*AMBIGUOUS), nn.Linear(*MISSING)
        self.output = nn.Linear(*OUTSIDE)


def float8_names(model):
    return {fqn for fqn, module in model.named_modules() if isinstance(module, Float8Linear)}


def test_check_tells_everything_before_any_layer_is_converted(make_filter):
    asked, model = make_filter(filter_fqns=["mlp"]), Model()
    warned, findings = warned_of(lambda: asked.check(model))
    assert [(category, text.split(",")[0]) for category, text in warned] == [
        (AmbiguousPointWarning, "ambiguous"),
        (MissingPointWarning, "missing"),
        (OutsideGridWarning, "output"),
        (UnmatchedPatternWarning, "filter_fqns: 'mlp' is in no linear's name"),
    ]
    assert findings == [Finding(*finding) for finding in warned]
    assert float8_names(model) == set()
    told = dict(asked.decisions)
    assert warned_of(lambda: convert_to_float8_training(model, module_filter_fn=asked))[0] == []
    assert float8_names(model) == {fqn for fqn, decision in told.items() if decision.convert}
    assert asked.decisions == told


def test_all_errors_are_raised_as_one(make_filter):
    with pytest.raises(AmbiguousPointWarning) as error:
        make_filter(strict=True, filter_fqns=["mlp"]).check(Model())
    assert [line.split(",")[0] for line in str(error.value).splitlines()] == [
        "ambiguous",
        "missing",
        "output",
        "filter_fqns: 'mlp' is in no linear's name",
    ]


def test_warnings_are_given_before_the_error(make_filter):
    def check():
        with pytest.raises(MissingPointWarning) as error:
            make_filter(on_missing="error", on_unmatched="error", filter_fqns=["mlp"]).check(Model())
        return len(str(error.value).splitlines())

    warned, lines = warned_of(check)
    assert [category for category, _ in warned] == [AmbiguousPointWarning, OutsideGridWarning]
    assert lines == 2


def test_check_takes_the_configs_of_a_model_that_is_not_built(make_filter):
    """torchtitan's converters get a config tree; wk and wv may share a config."""
    shared = LinearConfig(*WINNER)
    tree = [
        ("layers.0.attention.qkv_linear.wq", LinearConfig(*LOSER), None, "wq"),
        ("layers.0.attention.qkv_linear.wkv", shared, None, "wkv"),
        ("output", LinearConfig(*OUTSIDE), None, "output"),
        ("norm", object(), None, "norm"),
    ]
    asked = make_filter(filter_fqns=["output"])
    assert asked.check((fqn, config) for fqn, config, _, _ in tree) == []
    assert {fqn: decision.convert for fqn, decision in asked.decisions.items()} == {
        "layers.0.attention.qkv_linear.wq": False,
        "layers.0.attention.qkv_linear.wkv": True,
        "output": False,
    }


# --- mixed use, inside torchao's conversion --------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, size=WINNER) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size[1], size[0])
        self.lm_head = nn.Linear(*size, bias=False)
        self.lm_head.weight = self.embedding.weight


class Twice(nn.Module):
    """A model with the same linear in two blocks."""

    def __init__(self, size=WINNER) -> None:
        super().__init__()
        shared = nn.Linear(*size)
        self.encoder, self.decoder = nn.Sequential(shared), nn.Sequential(shared, nn.ReLU())


class TwiceInOnePlace(nn.Module):
    def __init__(self, size=WINNER) -> None:
        super().__init__()
        self.w1 = nn.Linear(*size)
        self.w3 = self.w1


class Lora(nn.Module):
    """The wrapper that peft puts around a linear. It is no nn.Linear, but has the same sizes."""

    def __init__(self, size=WINNER, rank=8) -> None:
        super().__init__()
        self.in_features, self.out_features = size
        self.base_layer = nn.Linear(*size)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(size[0], rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, size[1], bias=False)})


def wrapped(size=WINNER, rank=8):
    return nn.ModuleDict({"q_proj": Lora(size, rank)})


def converted(asked, model):
    return float8_names(convert_to_float8_training(model, module_filter_fn=asked))


MIXED = {
    "plain": lambda: nn.Sequential(nn.Linear(*WINNER), nn.ReLU(), nn.Linear(*LOSER)),
    "one linear": lambda: nn.Linear(*WINNER),
    "tied": Tied,
    "twice": Twice,
    "twice in one place": TwiceInOnePlace,
    "shared block": lambda: nn.ModuleDict(
        {"a": (block := nn.Sequential(nn.Linear(*WINNER))), "b": nn.Sequential(block)}
    ),
    "LoRA": wrapped,
    "experts": Model,
}


@pytest.mark.parametrize("make_model", MIXED.values(), ids=MIXED)
def test_check_asks_about_what_torchao_asks_about(make_filter, make_model):
    asked_by_torchao = []
    convert_to_float8_training(make_model(), module_filter_fn=lambda _, fqn: asked_by_torchao.append(fqn) or False)
    asked = make_filter()
    warned_of(lambda: asked.check(make_model()))
    assert set(asked.decisions) == set(asked_by_torchao)
    assert asked.decisions


@pytest.mark.parametrize(("size", "names"), [(WINNER, {"lm_head"}), (LOSER, set())])
def test_tied_head_is_decided_as_any_linear_and_stays_tied(make_filter, size, names):
    asked, model = make_filter(), Tied(size)
    assert converted(asked, model) == names
    assert list(asked.decisions) == ["lm_head"]
    assert model.lm_head.weight is model.embedding.weight
    assert type(model.embedding) is nn.Embedding


@pytest.mark.parametrize(("size", "names"), [(WINNER, {"encoder.0", "decoder.0"}), (LOSER, set())])
def test_linear_in_two_blocks_is_decided_under_both_names_and_keeps_one_weight(make_filter, size, names):
    asked, model = make_filter(), Twice(size)
    assert converted(asked, model) == names
    assert list(asked.decisions) == ["encoder.0", "decoder.0"]
    assert model.encoder[0].weight is model.decoder[0].weight


def test_linear_in_two_blocks_may_be_converted_in_one(make_filter):
    model = Twice()
    assert converted(make_filter(filter_fqns=["decoder"]), model) == {"encoder.0"}
    assert model.encoder[0].weight is model.decoder[0].weight


def test_second_name_in_one_place_is_left_as_it_is(make_filter):
    """torchao replaces only the first name."""
    asked, model = make_filter(), TwiceInOnePlace()
    assert converted(asked, model) == {"w1"}
    assert list(asked.decisions) == ["w1"]
    assert type(model.w3) is nn.Linear
    assert model.w1.weight is model.w3.weight


@pytest.mark.parametrize(
    ("size", "rank", "names"),
    [
        (WINNER, 8, {"q_proj.base_layer"}),
        (LOSER, 8, set()),
        (WINNER, 64, {"q_proj.base_layer", "q_proj.lora_A.default", "q_proj.lora_B.default"}),
    ],
)
def test_lora_wrapper_is_left_alone_and_its_linears_are_decided(make_filter, size, rank, names):
    asked = make_filter(on_ambiguous="ignore")
    assert converted(asked, wrapped(size, rank)) == names
    assert list(asked.decisions) == ["q_proj.base_layer", "q_proj.lora_A.default", "q_proj.lora_B.default"]
    if rank == 8:
        reasons = [asked.decisions[f"q_proj.lora_{ab}.default"].reason for ab in "AB"]
        assert reasons == ["n = 8: not a multiple of 16", "k = 8: not a multiple of 16"]


def test_model_on_the_meta_device_is_converted_there(make_filter):
    asked = make_filter()
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(*WINNER), nn.Linear(*LOSER))
    assert asked.check(model) == []
    assert converted(asked, model) == {"0"}
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_router_is_refused_experts_are_left_alone_and_shared_experts_are_decided(make_filter):
    asked, model = make_filter(), nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()])})
    assert asked.check(model) == []
    assert converted(asked, model) == {
        f"layers.{i}.{name}" for i in (0, 1) for name in ("attention", "moe.shared_expert")
    }
    assert asked.decisions["layers.1.moe.router"].reason == "n = 8: not a multiple of 16"
    assert not any("experts" in fqn for fqn in asked.decisions)


def test_grouped_weights_are_said_to_be_left_alone(make_filter):
    asked = make_filter()
    assert asked.left_alone == ()
    asked.check(nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()]), "experts2": Experts()}))
    assert asked.left_alone == ("layers.*.moe.experts", "experts2")
    assert asked.summary().endswith("; no linears, left in bf16: layers.*.moe.experts, experts2")
    asked.check(pairs(WINNER))  # pairs do not show grouped weights
    assert asked.left_alone == ()
    assert "left in bf16" not in asked.summary()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("size", "names"), [(WINNER, {"0"}), (LOSER, set())])
def test_bias_changes_no_answer_and_stays(make_filter, size, names, bias):
    model = nn.Sequential(nn.Linear(*size, bias=bias))
    before = model[0].bias
    assert converted(make_filter(), model) == names
    assert model[0].bias is before


def test_another_model_is_checked_as_if_it_were_the_first(make_filter):
    asked = make_filter(filter_fqns=["w1"], on_ambiguous="warn", parallel=Parallel(tp=2, plan={"w1": "replicated"}))
    warned_of(lambda: asked.check(pairs(AMBIGUOUS, WINNER)))
    warned, findings = warned_of(lambda: asked.check([("w7", LinearConfig(*WINNER))]))
    assert list(asked.decisions) == ["w7"]
    assert [text for _, text in warned] == [finding.message for finding in findings]
    assert [category for category, _ in warned] == [UnknownShardWarning, UnmatchedPatternWarning]
    assert list(asked.unknown_shards) == ["w7"]


def test_where_python_makes_warnings_errors_none_is_lost(make_filter):
    asked = make_filter()
    layers = pairs(AMBIGUOUS, MISSING, OUTSIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(AmbiguousPointWarning):
                asked.check(layers)
        with pytest.raises(MissingPointWarning):  # it was found before, but not yet said
            asked(LinearConfig(*WINNER), "w0")
    warned, findings = warned_of(lambda: asked.check(layers))
    assert {category for category, _ in warned} == {AmbiguousPointWarning, MissingPointWarning, OutsideGridWarning}
    assert len(findings) == 3


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.w1",
        "_orig_mod.w1",
        "module._orig_mod.w1",
        "_orig_mod.module.w1",
        "_forward_module.module.w1",
        "_checkpoint_wrapped_module.w1",
        "base_model.model.w1",
        "base_model.model.w1.base_layer",
        "module.base_model.model._orig_mod.w1.base_layer",
    ],
)
def test_names_are_matched_without_wrappers(make_filter, wrapped):
    asked = make_filter(filter_fqns=["w1"], recompute=lambda fqn: fqn == "w1")
    assert asked.settings.recomputes("w1")
    assert not asked(LinearConfig(*WINNER), wrapped)
    assert asked.decisions[wrapped].reason == "filter_fqns has 'w1'"
    assert asked.unmatched == ()
    recomputed = make_filter(recompute=lambda fqn: fqn == "w1")
    recomputed(LinearConfig(*WINNER), wrapped)
    assert "recomputed" in recomputed.decisions[wrapped].reason


def test_convolutions_are_no_grouped_experts(make_filter):
    model = nn.ModuleDict({"conv": nn.Conv1d(8, 8, 3), "w1": nn.Linear(*WINNER)})
    asked = make_filter()
    asked.check(model)
    assert asked.left_alone == ()
