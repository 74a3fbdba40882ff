"""Looking at a model: rows and calls of its linears, without data, memory, or a trace left in the model."""

from __future__ import annotations

import copy
import functools
import threading
import warnings

import pytest
import torch
from builders import make_point, make_table, write_file
from real_forward import rows_of_calls
from torch import nn
from torch.nn import functional as F
from torchao.float8 import convert_to_float8_training

from fp8gate import (
    NotPlainLinearWarning,
    ObserveError,
    Parallel,
    UnknownRowsWarning,
    UnmatchedPatternWarning,
    auto_filter,
)
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.model.observed import ObservedLinear
from fp8gate.filter.observe.observe import observe

WIDTH = 64


class Experts(nn.Module):
    """Each expert is an nn.Linear that sees the tokens that are routed to it, as the data say."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])

    def forward(self, x):
        chosen = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            at = (chosen == i).nonzero().squeeze(-1)
            out = out.index_add(0, at, expert(x[at]))
        return out


class Model(nn.Module):
    def __init__(self, *, experts=False):
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.mlp = nn.Linear(WIDTH, WIDTH)
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.never = nn.Linear(WIDTH, WIDTH)
        self.moe = Experts() if experts else None
        self.register_buffer("seen", torch.zeros(1))
        self.calls = 0

    def forward(self, ids, condition):
        self.calls += 1
        self.seen += 1
        x = self.embed(ids)
        scale, shift = self.modulation(condition).chunk(2, dim=-1)
        x = self.mlp(x * scale[:, None] + shift[:, None])
        x = self.twice(self.twice(x[:, ::2]))
        x = self.attention(x, x, x)[0]
        return self.moe(x.flatten(0, 1)) if self.moe is not None else x


IDS, CONDITION = torch.zeros(4, 32, dtype=torch.long), torch.zeros(4, WIDTH)
SEEN = {
    "modulation": ObservedLinear(calls=1, rows=4),
    "mlp": ObservedLinear(calls=1, rows=128),
    "twice": ObservedLinear(calls=2, rows=64),
    "attention.out_proj": ObservedLinear(is_read=True),
    "never": ObservedLinear(),
}


def test_rows_and_calls_are_those_of_a_real_forward():
    assert observe(Model(), (IDS, CONDITION)).linears == SEEN


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_model_and_inputs_may_be_on_the_meta_device(device):
    with torch.device(device):
        model = Model()
    inputs = {"ids": IDS.to("meta"), "condition": CONDITION.to(device)}
    assert observe(model, inputs).linears == SEEN


def test_nothing_of_the_model_changes():
    model = Model()
    model.eval()
    before, state = copy.deepcopy(vars(model)), copy.deepcopy(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    called = []
    model.mlp.register_forward_pre_hook(lambda *_: called.append("mlp"))
    rng = torch.get_rng_state()
    observe(model, (IDS, CONDITION))
    assert (model.calls, model.training, called, vars(model).keys()) == (0, False, [], before.keys())
    assert [id(p) for p in model.parameters()] == parameters
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.get_default_dtype() == torch.float32
    assert called == []
    model(IDS, CONDITION)
    assert called == ["mlp"]


def test_no_memory_is_taken():
    """A head of 16 GiB, and an activation of 64 GiB."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2**16, 2**16), nn.Linear(2**16, 2**17))
    found = observe(model, torch.empty(2**18, 2**16, device="meta"))
    assert [linear.rows for linear in found.linears.values()] == [2**18, 2**18]


def test_what_depends_on_the_data_is_not_known():
    linears = observe(Model(experts=True), (IDS, CONDITION)).linears
    assert linears["moe.router"] == ObservedLinear(calls=1, rows=64)
    assert linears["moe.experts.0"] == linears["moe.experts.1"] == ObservedLinear(calls=1, rows=None)


class Routed(nn.Module):
    """Each expert is an MLP of two nn.Linear, and a token goes to two of three experts."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3, bias=False)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(WIDTH, 96), nn.SiLU(), nn.Linear(96, WIDTH)) for _ in range(3)]
        )
        self.shared = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x.flatten(0, 1)
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        out = self.shared(x)
        for i, expert in enumerate(self.experts):
            token, place = torch.where(chosen == i)
            out = out.index_add(0, token, expert(x[token]) * weights[token, place, None])
        return out


def test_experts_of_linears_are_called_as_in_a_real_forward_with_rows_that_only_data_tell():
    model, inputs = Routed(), {"x": torch.empty(4, 32, WIDTH, device="meta")}
    observed = observe(model, inputs).linears
    real = rows_of_calls(model, inputs)
    assert {name: seen.calls for name, seen in observed.items()} == {name: len(rows) for name, rows in real.items()}
    assert {name: seen.rows for name, seen in observed.items() if "experts" not in name} == {"gate": 128, "shared": 128}
    experts = [name for name in real if "experts" in name]
    assert [observed[name].rows for name in experts] == [None] * 6
    assert sum(rows for name in experts for rows in real[name]) == 2 * 2 * 128


def test_of_several_microbatches_the_fewest_rows_count():
    short, long = (IDS[:, :8], CONDITION), {"ids": IDS, "condition": CONDITION}
    linears = observe(Model(), [long, short]).linears
    assert (linears["mlp"].rows, linears["twice"].rows, linears["modulation"].rows) == (32, 16, 4)
    assert linears["never"] == ObservedLinear()


class OnlyLong(nn.Module):
    def __init__(self):
        super().__init__()
        self.always, self.long = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.long(self.always(x)) if len(x) > 8 else self.always(x)


def test_a_linear_that_only_some_microbatches_reach_counts_by_those():
    linears = observe(OnlyLong(), [torch.zeros(4, WIDTH), torch.zeros(16, WIDTH)]).linears
    assert linears == {"always": ObservedLinear(calls=1, rows=4), "long": ObservedLinear(calls=1, rows=16)}


class NeedsData(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.linear(x) if x.sum().item() > 0 else x


def test_a_forward_that_needs_data_is_an_error_that_says_what_to_do():
    with pytest.raises(ObserveError) as caught:
        observe(NeedsData(), torch.zeros(4, WIDTH))
    assert "the forward cannot be run without data (" in str(caught.value)
    assert str(caught.value).endswith("say the rows instead: rows={pattern: number}")
    with pytest.raises(ObserveError, match=r"TypeError: .*forward\(\)"):
        observe(NeedsData(), ())


@pytest.mark.parametrize("inputs", [[], 3, "ids"])
def test_inputs_that_are_none_are_an_error(inputs):
    with pytest.raises(InputError, match=r"^example_inputs: expected "):
        observe(Model(), inputs)


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def test_names_are_those_without_wrappers(table):
    model = Wrapper(OnlyLong())
    assert set(observe(model, torch.zeros(4, WIDTH)).linears) == {"always", "long"}
    wants_float8 = asked(table)
    quietly(wants_float8.check, model, example_inputs=torch.zeros(16, WIDTH))
    assert {fqn: d.m for fqn, d in wants_float8.decisions.items()} == {"module.always": 16, "module.long": 16}


@functools.lru_cache
def kept(size):
    return torch.arange(size, dtype=torch.float32)


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.linear(x * kept(WIDTH))


def test_a_cache_that_keeps_tensors_without_data_is_an_error():
    with pytest.raises(ObserveError, match="the forward keeps tensors outside of the model, in a cache"):
        observe(Keeps(), torch.zeros(4, WIDTH))
    kept.cache_clear()
    kept(WIDTH)  # what was kept before has its data
    assert observe(Keeps(), torch.zeros(4, WIDTH)).linears["linear"].rows == 4


def test_a_forward_that_holds_the_real_model_is_not_run():
    model = OnlyLong()
    real = model.forward
    model.forward = lambda *args: real(*args)
    with pytest.raises(ObserveError, match="the forward of the model was replaced by a function; check it before that"):
        observe(model, torch.zeros(4, WIDTH))


class WithPlainTensor(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.lock = nn.Linear(WIDTH, WIDTH), threading.Lock

    def forward(self, x):
        return self.linear(x * self.scale)


def test_tensors_that_are_plain_attributes_and_owners_of_hooks_are_no_hindrance():
    class Owner:
        def __init__(self):
            self.lock = threading.Lock()  # cannot be copied

        def hook(self, *_):
            raise AssertionError("the copy has no hooks")

    model = WithPlainTensor()
    model.scale = torch.ones(WIDTH, device="meta")
    for kind in ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"):
        getattr(model, f"register_{kind}")(Owner().hook)
    assert observe(model, torch.zeros(4, WIDTH)).linears["linear"].rows == 4


def test_no_rows_at_all_are_doubted(table):
    wants_float8 = asked(table)
    with pytest.warns(UnknownRowsWarning, match=r"^always: the example inputs give it no rows"):
        wants_float8.check(OnlyLong(), example_inputs=torch.zeros(0, WIDTH))


def test_inputs_of_another_number_of_tokens_are_said(table):
    wants_float8 = asked(table, tokens=128)
    with pytest.warns(UnknownRowsWarning, match=r"^example_inputs: most linears have 16 rows, tokens says 128"):
        wants_float8.check(OnlyLong(), example_inputs=torch.zeros(16, WIDTH))
    assert asked(table, tokens=16, on_nothing="ignore").check(OnlyLong(), example_inputs=torch.zeros(16, WIDTH)) == []


def test_only_a_model_can_be_observed(table):
    for model in (None, [("a", nn.Linear(WIDTH, WIDTH))]):
        with pytest.raises(InputError, match=r"^example_inputs: expected a model that can be called"):
            asked(table).check(model, example_inputs=torch.zeros(4, WIDTH))


def test_a_lazy_linear_has_no_size_yet(table):
    wants_float8 = asked(table)
    quietly(wants_float8.check, nn.Sequential(nn.LazyLinear(WIDTH), nn.Linear(WIDTH, WIDTH)))
    assert list(wants_float8.decisions) == ["1"]


# --- decisions -------------------------------------------------------------------------------------------------

SIZES = {(WIDTH, 2 * WIDTH), (WIDTH, WIDTH), (WIDTH, 16)}
LOSES_BELOW = 64


@pytest.fixture
def table(tmp_path):
    """Float8 wins from 64 rows on, in layers of all sizes."""
    points = [make_point(m, k, n, 2.0 if m >= LOSES_BELOW else 0.5) for m in (16, 32, 64, 128) for k, n in SIZES]
    return write_file(make_table(*points), tmp_path / "rowwise.yaml")


def asked(table, *, tokens=128, **options):
    return auto_filter("rowwise", tokens=tokens, tables=table, plan=None, **options)


def quietly(check, *args, **options):
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        return check(*args, **options)


def test_the_observed_rows_decide(table):
    wants_float8 = asked(table)
    quietly(wants_float8.check, Model(), example_inputs=([IDS, CONDITION] and (IDS, CONDITION)))
    rows = {fqn: (d.m, d.convert, d.rows_from) for fqn, d in wants_float8.decisions.items() if d.speedup}
    assert rows == {"mlp": (128, True, "observed"), "twice": (64, True, "observed")}
    assert wants_float8.decisions["modulation"].reason == "m = 4: not a multiple of 16"
    assert wants_float8.decisions["never"].reason == "the example inputs never reach it"
    reason = wants_float8.decisions["attention.out_proj"].reason
    assert reason == "nn.MultiheadAttention reads its weight and never calls it"


class ReadsItsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.fused, self.called = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.called(F.linear(x, self.fused.weight))


def test_a_linear_whose_weight_is_read_by_others_is_refused(table):
    wants_float8 = asked(table)
    with pytest.warns(NotPlainLinearWarning, match=r"^fused: its weight is read and it is never called as a module"):
        wants_float8.check(ReadsItsWeight(), example_inputs=torch.zeros(128, WIDTH))
    assert {fqn: d.convert for fqn, d in wants_float8.decisions.items()} == {"fused": False, "called": True}


def test_what_the_user_states_counts_before_what_was_observed(table):
    wants_float8 = asked(table, rows={"m*": 64, "mlp": 32, "mo*": 128})
    quietly(wants_float8.check, Model(), example_inputs=(IDS, CONDITION))
    found = {fqn: (d.m, d.convert, d.rows_from) for fqn, d in wants_float8.decisions.items() if d.speedup}
    assert found == {
        "modulation": (128, True, "stated"),
        "mlp": (32, False, "stated"),
        "twice": (64, True, "observed"),
    }


def test_the_report_says_where_rows_came_from(table):
    wants_float8 = asked(table, rows={"mlp": 32})
    quietly(wants_float8.check, Model(), example_inputs=(IDS, CONDITION))
    lines = wants_float8.report().splitlines()
    assert "rows from" in lines[0]
    assert "stated" in next(line for line in lines if line.startswith("mlp"))
    assert "observed" in next(line for line in lines if line.startswith("twice"))
    unobserved = asked(table)
    quietly(unobserved.check, nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    assert "rows from" not in unobserved.report()


def test_context_parallelism_divides_observed_rows(table):
    wants_float8 = asked(table, parallel=Parallel(cp=2))
    quietly(wants_float8.check, Model(), example_inputs=(IDS, CONDITION))
    assert {fqn: d.m for fqn, d in wants_float8.decisions.items()} == {
        "modulation": 2,
        "mlp": 64,
        "twice": 32,
        "attention.out_proj": 64,
        "never": 64,
    }


def test_rows_that_depend_on_the_data_are_said_and_can_be_stated(table):
    wants_float8 = asked(table)
    with pytest.warns(UnknownRowsWarning, match=r"^moe\.experts\.\*: its rows depend on the data; taken as 128, all"):
        wants_float8.check(Model(experts=True), example_inputs=(IDS, CONDITION))
    stated = asked(table, rows={"*.experts.*": 32}, on_unknown_rows="error")
    quietly(stated.check, Model(experts=True), example_inputs=(IDS, CONDITION))
    assert stated.decisions["moe.experts.0"].m == 32


def test_a_pattern_that_matches_nothing_is_found(table):
    with pytest.warns(UnmatchedPatternWarning, match=r"^rows: 'moe\.\*' matched no linear$"):
        asked(table, rows={"moe.*": 32, "0": 64}).check(nn.Sequential(nn.Linear(WIDTH, WIDTH)))


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "8"])
def test_rows_that_are_no_count_are_refused(table, count):
    with pytest.raises(InputError, match=r"^rows\['a'\]: expected rows per microbatch, an integer of at least 1; got"):
        asked(table, rows={"a": count})


# --- linears that are not plain --------------------------------------------------------------------------------


class Zero(nn.Linear):
    def forward(self, x):
        return 0 * F.linear(x, self.weight)


class Plain(nn.Linear):
    pass


def packed():
    linear = nn.Linear(WIDTH, WIDTH, bias=False)
    linear.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH, dtype=torch.uint8), requires_grad=False)
    return linear


def patched():
    linear = nn.Linear(WIDTH, WIDTH)
    linear.forward = lambda x: x
    return linear


def doubled(linear, args):
    return (2 * args[0],)


def hooked(kind="forward_pre_hook", hook=doubled):
    linear = nn.Linear(WIDTH, WIDTH)
    getattr(linear, f"register_{kind}")(hook)
    return linear


DROPS_DOUBLED = "conversion would drop its hooks, such as test_observe.doubled; register them after it"
NOT_PLAIN = {
    "a subclass": (lambda: Zero(WIDTH, WIDTH), "Zero has a forward of its own, which conversion would drop"),
    "packed": (packed, "its weight is of torch.uint8"),
    "old weight_norm": (
        lambda: nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH)),
        "its weight is computed from other parameters, as by weight_norm",
    ),
    "weight_norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
        "its weight is computed from other parameters, as by weight_norm",
    ),
    "patched": (
        patched,
        "its forward was replaced, as by transformers' tensor parallelism, and conversion would drop that",
    ),
    "hooked": (hooked, DROPS_DOUBLED),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("make", "reason"), NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_is_no_plain_linear_is_left_alone_and_said(table, make, reason):
    model = nn.ModuleDict({"it": make(), "plain": Plain(WIDTH, WIDTH)})
    wants_float8 = asked(table)
    with pytest.warns(NotPlainLinearWarning, match=rf"^it: {reason}; left in bf16$"):
        wants_float8.check(model)
    assert {fqn: d.convert for fqn, d in wants_float8.decisions.items()} == {"it": False, "plain": True}
    assert wants_float8.decisions["it"].reason == reason


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_after_conversion_a_model_computes_what_it_did(table):
    """Within what float8 itself changes: 3 bits of mantissa, here in one product of 64 terms."""
    torch.manual_seed(0)
    kinds = {name.replace(" ", "_"): make() for name, (make, _) in NOT_PLAIN.items() if name != "packed"}
    model = nn.ModuleDict({**kinds, "attention": nn.MultiheadAttention(WIDTH, 2), "plain": Plain(WIDTH, WIDTH)})
    x = torch.randn(128, WIDTH)

    def outputs():
        found = {name: layer(x) for name, layer in model.items() if name != "attention"}
        return {**found, "attention": model["attention"](x, x, x)[0]}

    before = outputs()
    wants_float8 = asked(table)
    quietly(wants_float8.check, model)
    convert_to_float8_training(model, module_filter_fn=wants_float8)
    after = outputs()
    assert type(model["plain"]).__name__ == "Float8Linear"
    for name, value in before.items():
        error = (after[name] - value).norm() / value.norm().clamp(min=1e-6)
        assert error < (0.1 if name == "plain" else 1e-6), name


class Observer:
    def __call__(self, *_):
        pass

    def look(self, *_):
        pass


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"])
@pytest.mark.parametrize(
    ("hook", "name"),
    [
        (doubled, "doubled"),
        (functools.partial(functools.partial(doubled)), "doubled"),
        (Observer(), "Observer"),
        (Observer().look, "Observer.look"),
    ],
)
def test_hooks_of_every_kind_are_named(table, kind, hook, name):
    wants_float8 = asked(table)
    with pytest.warns(NotPlainLinearWarning, match=rf"^it: .* such as test_observe\.{name}; register them after it"):
        wants_float8.check(nn.ModuleDict({"it": hooked(kind, hook), "plain": Plain(WIDTH, WIDTH)}))
    assert {fqn: d.convert for fqn, d in wants_float8.decisions.items()} == {"it": False, "plain": True}


def test_torchao_drops_hooks():
    """Where this fails, hooks need no finding any more."""
    model = nn.ModuleDict({"it": hooked()})
    convert_to_float8_training(model)
    assert not model["it"]._forward_pre_hooks


def test_layers_with_hooks_are_one_finding_until_the_hooks_are_removed(table):
    layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
    handles = [layer.register_forward_hook(doubled) for layer in layers]
    model = nn.ModuleDict({"layers": layers})
    model.register_forward_hook(doubled)  # of a block: it stays
    wants_float8 = asked(table, on_nothing="ignore")
    found = quietly(wants_float8.check, model)
    assert [finding.message for finding in found] == [f"layers.*: {DROPS_DOUBLED}; left in bf16"]
    for handle in handles:
        handle.remove()
    assert asked(table, strict=True).check(model) == []


def test_a_linear_that_the_user_leaves_out_may_have_hooks(table):
    model = nn.ModuleDict({"it": hooked(), "plain": Plain(WIDTH, WIDTH)})
    assert asked(table, strict=True, filter_fqns=["it"]).check(model) == []


def test_a_frozen_weight_is_decided_without_its_gradient(table, tmp_path):
    """bf16: 100 + 200 us; float8: 100 + 100 us. Frozen: bf16 200 us, float8 at most 100 + 50 us."""
    from fp8gate.filter.contract.table import Point

    point = Point(128, WIDTH, WIDTH, 100.0, 200.0, 100.0, 100.0, 1.5, 1.5, 1.5, "measured")
    path = write_file(make_table(point), tmp_path / "frozen.yaml")
    linear = nn.Linear(WIDTH, WIDTH, bias=False)
    wants_float8 = asked(path)
    wants_float8.check([("trained", linear), ("frozen", copy.deepcopy(linear).requires_grad_(False))])
    assert wants_float8.decisions["trained"].speedup == pytest.approx(1.5)
    assert wants_float8.decisions["frozen"].speedup == pytest.approx(200 / 150)
    assert wants_float8.decisions["frozen"].reason == "measured, at least, as the weight is frozen"


@pytest.mark.parametrize(
    "name",
    [
        "experts.0.w1",
        "pooler",
        "pooler.dense",
        "modulation.linear",
        "time_embedding.linear_1",
        "adaLN_modulation.1",
        "transformer_blocks.0.norm1_context.linear",
        "norm_out.linear",
    ],
)
def test_names_for_which_all_tokens_are_doubtful_are_found(table, name):
    wants_float8 = asked(table)
    with pytest.warns(UnknownRowsWarning):
        wants_float8.check([(name, nn.Linear(WIDTH, WIDTH)), ("layers.0.mlp.w1", nn.Linear(WIDTH, WIDTH))])
    assert wants_float8.decisions[name].convert


def test_ordinary_names_raise_no_doubt(table):
    wants_float8 = asked(table, strict=True)
    names = ("layers.0.mlp.w1", "model.layers.1.self_attn.q_proj", "shared_expert.w1", "lm_head", "h.0.attn.c_attn")
    wants_float8.check([(name, nn.Linear(WIDTH, WIDTH)) for name in names])


# --- what else a model has -------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """As in transformers' GPT-2: a product whose weight is stored transposed."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.zeros(nx, nf))


def test_products_that_are_no_linears_are_named_in_the_summary(table):
    model = nn.ModuleDict({"c": Conv1D(WIDTH, WIDTH), "embed": nn.Embedding(8, 8), "a": nn.Linear(WIDTH, WIDTH)})
    model["attention"], model["norm"] = nn.MultiheadAttention(WIDTH, 2), nn.LayerNorm(WIDTH)
    wants_float8 = asked(table, on_not_plain="ignore")
    wants_float8.check(model)
    assert "products that are no nn.Linear, left in bf16: c, attention" in wants_float8.summary()
    wants_float8.check(nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH)}))
    assert "no nn.Linear" not in wants_float8.summary()


@pytest.mark.parametrize(("shape", "is_grouped"), [((1, 1, 8), False), ((1, 16, 8), False), ((2, 8, 8), True)])
def test_class_tokens_and_positions_are_no_experts(table, shape, is_grouped):
    model = nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH)})
    model.cls_token = nn.Parameter(torch.zeros(shape))
    wants_float8 = asked(table)
    wants_float8.check(model)
    assert (wants_float8.left_alone != ()) == is_grouped


def test_a_check_after_the_conversion_says_so(table):
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)])})
    wants_float8 = asked(table, strict=True)
    wants_float8.check(model)
    convert_to_float8_training(model, module_filter_fn=wants_float8)
    assert wants_float8.check(model) == []
    assert "already converted: layers.*" in wants_float8.summary()


@pytest.mark.parametrize(("pattern", "is_missed"), [("lm_head", False), ("output", False), ("layers.9", True)])
def test_a_pipeline_stage_may_be_without_the_head(table, pattern, is_missed):
    wants_float8 = asked(table, filter_fqns=[pattern], on_unmatched="error")
    model = nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH)})
    if is_missed:
        with pytest.raises(UnmatchedPatternWarning, match=r"^filter_fqns: 'layers\.9' is in no linear's name$"):
            wants_float8.check(model)
    else:
        assert wants_float8.check(model) == []


# --- small inputs, by the tables of an H200 --------------------------------------------------------------------


def on_h200(model, *, tokens=8192, **options):
    """What `check` finds, with what it converts."""
    wants_float8 = auto_filter("tensorwise", tokens=tokens, device="H200", on_stale="ignore", **options)
    findings = quietly(wants_float8.check, model)
    return {fqn: d.convert for fqn, d in wants_float8.decisions.items()}, [f.message for f in findings]


def wide(*size, **options):
    return nn.Linear(*size, bias=False, device="meta", **options)


def test_linears_of_few_rows_are_doubted_and_can_be_stated():
    model = nn.ModuleDict(
        {
            "experts": nn.ModuleList([wide(7168, 2048)] * 2),
            "modulation": wide(3072, 18432),
            "pooler": wide(4096, 4096),
        }
    )
    _, messages = on_h200(model)
    assert [message.split(":")[0] for message in messages] == ["experts.*", "modulation", "pooler"]
    stated = {"experts.*": 256, "modulation": 16, "pooler": 4}
    converted, messages = on_h200(model, rows=stated, on_outside="ignore", on_nothing="ignore")
    assert (any(converted.values()), messages) == (False, [])


@pytest.mark.parametrize("tokens", [16, 512, 1024, 2048])
def test_few_tokens_are_never_said_to_win_where_none_were_measured(tokens):
    converted, messages = on_h200(nn.ModuleDict({"a": wide(4096, 14336)}), tokens=tokens, on_nothing="ignore")
    assert converted["a"] == (tokens >= 1024)
    assert any("outside" in message for message in messages) == (tokens < 1024)


def test_strict_holds_for_a_narrow_linear_and_a_large_head():
    """Both lie outside the measured range, and border and trend agree."""
    assert on_h200(nn.ModuleDict({"a": wide(4096, 14336), "b": wide(4096, 16)}), strict=True) == (
        {"a": True, "b": False},
        [],
    )
    model = nn.ModuleDict({"lm_head": wide(4096, 128_256)})
    assert on_h200(model, strict=True) == ({"lm_head": True}, [])
