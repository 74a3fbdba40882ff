"""`fp8gate plan` that is stopped: the incomplete plan that it leaves, and the same command that completes it."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from plans import PROTOCOL, TINY_CONFIG, Block, block_input, make_plan
from samples import CPU, NOON, SOFTWARE, quick_visits
from torch import nn
from typer.testing import CliRunner

from fp8gate.calibrate.arms.blueprint import Blueprint
from fp8gate.calibrate.arms.failure import Failure
from fp8gate.calibrate.device.cpu import Cpu
from fp8gate.calibrate.planning import plan_writing
from fp8gate.calibrate.planning.block_worker import Visit
from fp8gate.calibrate.planning.block_worker_pool import BlockWorkerDiedError, BlockWorkerPool, StoppedError
from fp8gate.calibrate.planning.plan_block import PlanSearch
from fp8gate.calibrate.planning.plan_writing import plan_model, write_incomplete_plans
from fp8gate.calibrate.planning.search import BF16_SET, CONTROL_SET
from fp8gate.calibrate.planning.subject import Subject
from fp8gate.calibrate.planning.table_answer import TableAnswer
from fp8gate.calibrate.planning.visit_journal import PlanJournal, PlanSetup, VisitRecord
from fp8gate.calibrate.planning.visit_rounds import MAX_SLOWDOWNS, VisitRounds
from fp8gate.cli import app
from fp8gate.filter.contract import plain_yaml
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.plans.plan_file import are_complete, format_plans, parse_plans, read_plans, write_plans

INNER, OUTER = frozenset({"inner"}), frozenset({"outer"})
VISITS = PROTOCOL.screening + PROTOCOL.final


@pytest.fixture(autouse=True, scope="module")
def _quick(tmp_path_factory):
    with quick_visits(tmp_path_factory.mktemp("locks")):
        yield


def subject_of(block, layers):
    blueprint = Blueprint.of(block, [block_input()], recomputed=False)
    whole = {role: (shape.k, shape.n) for role, shape in blueprint.shapes.items()}
    return Subject(name="tiny", blueprint=blueprint, whole=whole, tokens=16, layers=layers)


def subjects():
    """Two kinds of layers; the second has one linear more."""
    wider = nn.Sequential(Block(), nn.Linear(32, 32, dtype=torch.bfloat16))
    return [subject_of(Block(), "model.layers.0"), subject_of(wider, "model.layers.1-2")]


# --- the set that is chosen ------------------------------------------------------------------------------------


def so_far(folder, *visits):
    """The plan of these visits: a set, what each took in us or why it failed, and the rounds that it was visited in."""
    subject = subject_of(Block(), "model.layers.*")
    setup = PlanSetup(
        recipe="rowwise",
        model="tiny",
        tokens=16,
        sequence=None,
        tp=1,
        recompute="none",
        device=CPU,
        software=SOFTWARE,
        protocol=PROTOCOL,
        block=subject.blueprint.identity,
        shapes={role: (shape.m, shape.k, shape.n) for role, shape in subject.blueprint.shapes.items()},
    )
    with PlanJournal(folder, setup) as journal:
        for one, found, rounds in visits:
            times = {"status": found} if isinstance(found, str) else {"fwd_us": found / 4, "bwd_us": found * 3 / 4}
            for at in rounds:
                journal.append(VisitRecord(convert=tuple(sorted(one)), round=at, measured_at=NOON, **times))
        rounds = VisitRounds(None, journal, subject.blueprint.shapes, lambda _: None, start=time.monotonic())
        return PlanSearch(subject, TableAnswer(None, None, {}, []), rounds).so_far()


@pytest.mark.parametrize(
    "visits",
    [
        [],
        [(BF16_SET, 400.0, [1])],
        [(INNER, 200.0, [1])],
        [(INNER, 200.0, [1]), (BF16_SET, 400.0, [2])],  # in another round
        [(INNER, "failed", [1, 1]), (BF16_SET, 400.0, [1])],
        [(CONTROL_SET, 400.0, [1]), (BF16_SET, 400.0, [1])],
    ],
)
def test_without_bf16_and_another_set_in_one_round_there_is_no_plan(tmp_path, visits):
    assert so_far(tmp_path, *visits) is None


SCREENED = [(BF16_SET, 400.0, [1]), (INNER, 320.0, [1])]
"""1.25x, with 1.131 as its lower bound: the noise is 0.1."""
CLOSE = [(BF16_SET, 400.0, [1]), (INNER, 400 / (1.2004 * math.exp(0.1)), [1]), (CONTROL_SET, 400 / 1.2002, [1])]
"""Its lower bound is 1.2004, the control 1.2002."""
FINAL = [(BF16_SET, 400.0, range(1, 8)), (INNER, 360.0, range(1, 8))]
"""1.111x, by all visits."""


@pytest.mark.parametrize(
    ("visits", "convert", "control"),
    [
        (SCREENED, ("inner",), None),
        ([(BF16_SET, 400.0, [1]), (INNER, 380.0, [1])], (), None),  # 1.053x, which is less than the noise
        ([(BF16_SET, 400.0, [1]), (INNER, 440.0, [1])], (), None),
        ([*SCREENED, (OUTER, 300.0, [1])], ("outer",), None),
        ([*SCREENED, (OUTER, 300.0, [2])], ("inner",), None),  # bf16 was not visited with it
        ([*SCREENED, (OUTER, "failed", [1, 1])], ("inner",), None),
        ([*SCREENED, (CONTROL_SET, 380.0, [1])], ("inner",), 400 / 380),
        ([*SCREENED, (CONTROL_SET, 340.0, [1])], (), 400 / 340),
        ([*SCREENED, (CONTROL_SET, 460.0, [1])], (), 400 / 460),
        ([*SCREENED, (CONTROL_SET, "failed", [1, 1])], (), None),
        (CLOSE, (), 1.2002),  # the file has 1.2
        (FINAL, ("inner",), None),
        ([*FINAL, (OUTER, 340.0, [1])], ("inner",), None),  # 1.176x, not more by the noise than what all visits say
        ([*FINAL, (OUTER, 320.0, [1])], ("outer",), None),
        ([*FINAL, (OUTER, 340.0, range(1, 8))], ("outer",), None),
        ([(BF16_SET, 400.0, [1, 2]), (INNER, 320.0, [1]), (INNER, 380.0, [2])], ("inner",), None),
    ],
)
def test_the_best_set_that_was_visited_is_chosen_by_the_rule_of_the_search(tmp_path, visits, convert, control):
    found = so_far(tmp_path, *visits)
    assert (found.convert, found.incomplete) == (convert, True)
    assert found.control == pytest.approx(control)
    assert found.measured_at == NOON
    (read,) = parse_plans(format_plans([found]), source="plan.yaml")
    assert (read.convert, read.incomplete, read.control) == (found.convert, True, found.control)


# --- the file --------------------------------------------------------------------------------------------------


class Stop:
    """Counts the visits of all sets, and lets them end once a condition holds.

    at: of the sets visited so far and the one to be visited now. ends: raises, or answers in place of the visit.
    """

    def __init__(self, at, ends):
        self.at, self.ends, self.visited = at, ends, []

    def __call__(self, visit, one):
        if self.at(self.visited, one):
            return self.ends(one)
        self.visited.append(one)
        return visit(one)


def raising(error):
    def end(_):
        raise error

    return end


def after(count):
    return lambda visited, _: len(visited) >= count


@pytest.fixture
def stop(monkeypatch):
    """Lets the visits of a plan end; None lets them go on."""
    visit, stops = BlockWorkerPool.visit, []
    monkeypatch.setattr(BlockWorkerPool, "visit", lambda pool, one: stops[-1](lambda one: visit(pool, one), one))

    def set_stop(at=lambda visited, one: False, ends=None):
        stops.append(Stop(at, ends or raising(KeyboardInterrupt())))
        return stops[-1]

    set_stop()
    return set_stop


@pytest.fixture
def run(tmp_path):
    """`plan_model`, and what it said."""
    path, nothing = tmp_path / "plans" / "tiny.yaml", tmp_path / "tables"
    nothing.mkdir()

    def run(of=None, **options):
        said = []
        fixed = {"recipe": "rowwise", "protocol": PROTOCOL, "tables": nothing, "say": said.append}
        try:
            plan_model(of or subjects(), path, **fixed, **options)
        except BaseException as error:  # whatever ended it
            return said, error
        return said, None

    run.path = path
    return run


def finals(visited, _):
    return visited.count(CONTROL_SET) == 3


@pytest.mark.parametrize(
    ("at", "has_control"), [(after(3), False), (finals, True)], ids=["in the screening", "within the finals"]
)
def test_what_was_measured_is_in_an_incomplete_plan_that_the_same_call_completes(run, stop, at, has_control):
    begun = stop(at)
    said, error = run(subjects()[:1])
    assert isinstance(error, KeyboardInterrupt)
    (found,) = read_plans(run.path)
    assert (found.incomplete, found.missing, found.convert) == (True, (), ())  # on a CPU nothing wins
    assert len(found.candidates) >= 2
    assert found.visits <= len(begun.visited) - begun.visited.count(CONTROL_SET)
    assert (found.control is not None) == has_control
    visits = f"{found.visits} visits of model.layers.0"
    assert said[-1] == f"wrote {run.path}, incomplete, with {visits}: the same command goes on, and completes it"

    rest = stop()
    said, error = run(subjects()[:1])
    (complete,) = read_plans(run.path)
    assert (error, are_complete([complete]), said[-1]) == (None, True, f"wrote {run.path}")
    twice = len(begun.visited) + len(rest.visited) - complete.visits - VISITS  # the control has rows of no candidate
    assert 0 <= twice < 3  # those of the round in which it was stopped before bf16 came
    assert all(complete.candidate(one.convert).visits >= one.visits for one in found.candidates)


def test_with_bf16_alone_no_file_is_written(run, stop):
    stop(lambda visited, one: one != BF16_SET)
    said, error = run()
    assert isinstance(error, KeyboardInterrupt)
    assert said[-1] == "no plan is written: bf16 and another set have not both been visited yet"
    assert not run.path.exists()


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        StoppedError("the time is up"),
        BlockWorkerDiedError("its process was killed by signal 9", INNER),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 1),
    ],
    ids=["Ctrl-C", "the clock", "a dead worker", "the device"],
)
def test_whatever_ends_it_early_is_raised_after_the_file_is_written(run, stop, error):
    stop(after(6), raising(error))
    said, raised = run()
    assert raised is error
    (first,) = read_plans(run.path)
    assert (first.incomplete, first.missing) == (True, ("model.layers.1-2",))
    assert f"wrote {run.path}, incomplete, with {first.visits} visits of model.layers.0, nothing of" in said[-1]


def test_a_gpu_that_slows_down_leaves_a_plan(run, stop):
    stop(after(6), lambda _: Visit(1.0, 1.0, None, False, slowdown="the clock fell"))
    said, error = run()
    assert str(error).startswith(f"the clock fell of the GPU, {MAX_SLOWDOWNS} times in a row")
    assert read_plans(run.path)[0].incomplete
    assert sum("again: the clock fell of the GPU" in line for line in said) == MAX_SLOWDOWNS


def test_where_bf16_cannot_be_loaded_any_more_what_the_journal_has_is_written(run, stop, monkeypatch):
    stop(after(6))
    run()
    before = read_plans(run.path)
    run.path.unlink()
    load = BlockWorkerPool.load
    failure = Failure("out_of_memory", "no room")
    monkeypatch.setattr(BlockWorkerPool, "load", lambda pool, one: load(pool, one) if one else failure)
    _, error = run()
    assert str(error).startswith("bf16 could not be measured")
    assert [(plan.visits, plan.convert) for plan in read_plans(run.path)] == [(before[0].visits, before[0].convert)]


def test_after_bad_input_nothing_is_written(run, stop):
    """Another command is to be run then."""
    stop(after(6), raising(InputError("--this: expected that")))
    _, error = run()
    assert isinstance(error, InputError)
    assert not run.path.exists()


def test_with_fresh_the_command_that_goes_on_is_another(run, stop):
    stop(after(6))
    said, _ = run(fresh=True)
    assert said[-1].endswith(": the same command without --fresh goes on, and completes it")


@pytest.mark.parametrize("visits_of_second", [0, 6])
def test_kinds_that_were_finished_are_complete_and_those_not_begun_are_missing(run, stop, visits_of_second):
    _, error = run(subjects()[:1])
    assert error is None
    run.path.unlink()
    stop(after(visits_of_second))  # the journal has the first kind's
    said, error = run()
    assert isinstance(error, KeyboardInterrupt)
    first, *others = read_plans(run.path)
    assert (first.layers, first.incomplete) == ("model.layers.0", False)
    if visits_of_second:
        (second,) = others
        assert (second.layers, second.incomplete, second.missing) == ("model.layers.1-2", True, ())
        assert f"with {second.visits} visits of model.layers.1-2:" in said[-1]
    else:
        assert (others, first.missing) == ([], ("model.layers.1-2",))
        assert "incomplete, with nothing of model.layers.1-2:" in said[-1]
    stop()
    _, error = run()
    assert error is None
    plans = read_plans(run.path)
    assert ([plan.layers for plan in plans], are_complete(plans)) == (["model.layers.0", "model.layers.1-2"], True)


# --- what it may replace ---------------------------------------------------------------------------------------

STOPPED = make_plan(incomplete=True)  # of 15 visits


@pytest.mark.parametrize(
    ("there_is", "reason"),
    [
        (None, None),
        ([make_plan()], "it is complete"),
        ([make_plan(incomplete=True, convert=())], None),  # of as many visits
        (
            [make_plan(layers="model.layers.0"), make_plan(layers="model.layers.1", incomplete=True)],
            "it has 30 visits, this search 15",
        ),
        (
            [make_plan(layers="model.layers.0", missing=("model.layers.1",), candidates=make_plan().candidates[:2])],
            None,
        ),
    ],
    ids=["nothing", "complete", "as many visits", "more visits", "fewer visits"],
)
def test_an_incomplete_plan_replaces_only_worse_ones(tmp_path, there_is, reason):
    path, said = tmp_path / "plan.yaml", []
    if there_is:
        write_plans(there_is, path)
    before = path.read_text() if there_is else None
    write_incomplete_plans([STOPPED], subjects()[:1], path, said.append, "the same command")
    if reason:
        assert path.read_text() == before
        assert said[0].startswith(f"{path} is kept: {reason}")
    else:
        assert read_plans(path) == (STOPPED,)
        assert said[0].startswith(f"wrote {path}, incomplete, with 15 visits: ")


def test_a_file_that_cannot_be_read_is_kept(tmp_path):
    """A later release may have written it."""
    path, said = tmp_path / "plan.yaml", []
    path.write_text("schema: 2\n")
    write_incomplete_plans([STOPPED], subjects()[:1], path, said.append, "the same command")
    assert path.read_text() == "schema: 2\n"
    assert said[0].startswith(f"{path} is kept: it cannot be read ({path}: $.schema: expected 1")


def test_that_it_cannot_be_written_does_not_hide_why_the_command_ended(run, stop, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device", "plan.yaml")

    monkeypatch.setattr(plan_writing, "write_plans", fail)
    stop(after(6), raising(StoppedError("the time is up")))
    said, error = run()
    assert isinstance(error, StoppedError)
    assert said[-1] == "the incomplete plan cannot be written: [Errno 28] No space left on device: 'plan.yaml'"


@pytest.mark.parametrize("has_earlier", [True, False])
def test_a_second_ctrl_c_leaves_the_file_as_it_was(tmp_path, monkeypatch, has_earlier):
    path = tmp_path / "plan.yaml"
    if has_earlier:
        write_plans([make_plan(incomplete=True, convert=())], path)
    before = {file.name: file.read_text() for file in tmp_path.iterdir()}

    def press_ctrl_c(*_):
        assert len(list(tmp_path.iterdir())) > len(before)  # the new text is there, under another name
        raise KeyboardInterrupt

    monkeypatch.setattr(plain_yaml.os, "replace", press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        write_incomplete_plans([STOPPED], subjects()[:1], path, lambda _: None, "the same command")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == before


# --- the command -----------------------------------------------------------------------------------------------

TWO_KINDS = {
    **TINY_CONFIG,
    "model_type": "glm4_moe",
    "head_dim": 16,
    "intermediate_size": 120,  # no multiple of 16: fewer roles
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The command on a tiny model of two kinds of layers and this CPU."""
    pytest.importorskip("transformers")
    gc.freeze()  # what that has imported too
    monkeypatch.setattr(Cpu, "defaults", replace(Cpu.defaults, visit_run_s=0.001))
    config = tmp_path / "tiny" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(TWO_KINDS))
    (tmp_path / "tables").mkdir()

    def run(*args):
        place = ["--device", "cpu", "--out", str(tmp_path / "out"), "--tables", str(tmp_path / "tables")]
        return CliRunner().invoke(app, ["plan", str(config), "--recipe", "rowwise", "--tokens", "32", *place, *args])

    return run


def send(number):
    return lambda _: os.kill(os.getpid(), number) or time.sleep(60)


@pytest.mark.parametrize(
    ("ends", "exit_code", "last"),
    [
        (raising(StoppedError("the time is up")), 1, "fp8gate: the time is up; run the same command to go on"),
        (send(signal.SIGTERM), 143, "fp8gate: ended by SIGTERM; what was measured is in the journal: run the same co"),
        (raising(KeyboardInterrupt()), 130, "fp8gate: stopped; what was measured is in the journal: run the same co"),
    ],
    ids=["the clock", "SIGTERM", "Ctrl-C"],
)
def test_the_stopped_command_names_the_file_and_goes_on(command, stop, tmp_path, ends, exit_code, last):
    stop(after(12), ends)
    stopped = command()
    assert stopped.exit_code == exit_code, stopped.output
    (path,) = (tmp_path / "out").rglob("*.yaml")
    (found,) = read_plans(path)
    assert (found.layers, found.incomplete, found.missing) == ("model.layers.0", True, ("model.layers.1-2",))
    *_, wrote, ending = stopped.stderr.splitlines()
    how_far = f"{found.visits} visits of model.layers.0, nothing of model.layers.1-2"
    assert wrote == f"wrote {path}, incomplete, with {how_far}: the same command goes on, and completes it"
    assert ending.startswith(last)
    stop()
    finished = command("--json")
    assert finished.exit_code == 0, finished.output
    assert [plan["incomplete"] for plan in json.loads(finished.stdout)["plans"]] == [False, False]
    assert are_complete(read_plans(path))


def test_stopped_before_its_first_visit_it_writes_nothing(command, tmp_path):
    stopped = command("--stop-after", "0")
    assert stopped.exit_code == 1
    assert "no plan is written: bf16 and another set have not both been visited yet\n" in stopped.stderr
    assert list((tmp_path / "out").rglob("*.yaml")) == []
