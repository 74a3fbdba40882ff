"""`fp8gate calibrate`: its options, its errors, and that nothing measured is lost, however it ends."""

from __future__ import annotations

import functools
import json
import os
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from builders import make_point, make_table
from forked import Gate, Processes
from samples import journal_points, quick_points
from typer.testing import CliRunner

from fp8gate.calibrate.device.lock import DeviceLock
from fp8gate.calibrate.points.setup import make_setup
from fp8gate.calibrate.processes import forkserver
from fp8gate.calibrate.sweep import run_sweep as sweep_module
from fp8gate.calibrate.sweep.run_sweep import SweepResult
from fp8gate.calibrate.sweep.sweep_report import SweepReport
from fp8gate.cli import app, options
from fp8gate.cli.calibrate import model_shapes
from fp8gate.filter.contract.errors import UnfinishedError
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Grid, Incomplete, read_table
from fp8gate.filter.model.model_config import BUNDLED

SIX_SHAPES = [(32, k, n) for k in (32, 48, 64) for n in (32, 64)]
TINY_CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
MAX_RUNS = 3  # until bf16 agrees with itself, on a machine that others use too
GO_ON = "fp8gate: stopped; what was measured is in the journal: run the same command to go on"
REPORT = SweepReport(
    measured=5,
    resumed=4,
    retried=3,
    ambiguous=2,
    without_numbers=1,
    capped=0,
    total_s=60.0,
    starting_s=10.0,
    compiling_s=100.0,
    loading_s=9.0,
    settling_s=8.0,
    timing_s=7.0,
    idle_s=6.0,
    controls=0,
    worst_control=None,
    spread={},
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def locks(tmp_path_factory, monkeypatch):
    """The folder where sweeps lock the device, so that a sweep of another test does not find it busy."""
    folder = tmp_path_factory.mktemp("locks")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def _quick_points():
    with quick_points():
        yield


@pytest.fixture
def grid_file(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("m: [32]\nk: [32, 48, 64]\nn: [32, 64]\n")
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "tables"


@pytest.fixture
def calibrate(grid_file, out):
    """Runs the command in this process, on the CPU and the six tiny shapes unless told otherwise."""

    def run(*args: str):
        defaults = ["--device", "cpu", "--grid", str(grid_file), "--out", str(out)]
        return CliRunner().invoke(app, ["calibrate", *defaults, *args])

    return run


@pytest.fixture
def swept(monkeypatch):
    """The arguments that the command gives to `sweep`, which measures nothing here."""
    asked = {}

    def sweep(grid, shapes, **options):
        asked.update(options, grid=grid, shapes=list(shapes))
        return swept_to()

    monkeypatch.setattr(sweep_module, "sweep", sweep)
    return asked


def swept_to(**outcome) -> SweepResult:
    return SweepResult(**{"tables": {}, "report": REPORT, "remaining": 0, "capped": {}, "off": {}, **outcome})


@pytest.fixture
def start(tmp_path, grid_file, out):
    """Starts the command in another process, on the CPU and the six tiny shapes; its points take milliseconds."""
    processes = Processes(tmp_path)
    args = ("calibrate", "--device", "cpu", "--grid", str(grid_file), "--out", str(out))
    yield functools.partial(processes.start_command, *args)
    processes.kill()


def finish(calibrate, out):
    """Run the command to its end, again if bf16 differed from itself. Returns the result and the points it resumed."""
    for _ in range(MAX_RUNS):
        resumed = len(journal_points(out))
        result = calibrate()
        if "bf16 against itself was" not in result.stdout:
            return result, resumed
    raise AssertionError(result.stdout)


def complete_lines(out) -> bytes:
    (journal,) = out.rglob("journal-*.jsonl")
    content = journal.read_bytes()
    return content[: content.rindex(b"\n") + 1]


def test_killed_again_and_again_it_measures_every_point_once(start, out, tmp_path):
    kept = b""
    for before, number in ((0, 1), (0, 2), (1, 2)):  # at its first point, then at its second twice
        gate = Gate(tmp_path / f"gate {before} {number}", number)
        command = start(change=gate)
        gate.wait_for(command)
        command.kill()
        assert command.exit_code() == -signal.SIGKILL
        assert len(journal_points(out)) == before + number - 1
        assert complete_lines(out).startswith(kept)
        assert list(out.rglob("*.yaml")) == []
        kept = complete_lines(out)

    finished = start()
    assert finished.exit_code() == 0, finished.said
    assert "5 points measured, 2 taken from the journal" in finished.said
    assert complete_lines(out).startswith(kept)
    measured = journal_points(out)
    assert sorted(measured[:6]) == SIX_SHAPES
    assert len(measured) == len(SIX_SHAPES) + 1  # one of them again, for the spread
    tables = {path.stem: read_table(path) for path in out.rglob("*.yaml")}
    assert set(tables) == set(RECIPES)
    for table in tables.values():
        assert [(p.m, p.k, p.n) for p in table.points] == SIX_SHAPES


def test_ctrl_c_says_how_to_go_on(start, out, tmp_path):
    at_second = Gate(tmp_path / "gate", 2)
    command = start(change=at_second)
    at_second.wait_for(command)
    command.press_ctrl_c()
    assert command.exit_code() == 130, command.said
    assert command.said.splitlines()[-1] == GO_ON
    assert "Traceback" not in command.said
    assert len(journal_points(out)) == 1


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_incomplete_tables_that_the_same_command_completes(start, out, tmp_path, number, exit_code):
    at_fourth = Gate(tmp_path / "gate", 4)
    command = start(change=at_fourth)
    at_fourth.wait_for(command)
    os.kill(command.process.pid, number)
    assert command.exit_code() == exit_code, command.said
    for recipe in RECIPES:
        (path,) = out.rglob(f"{recipe}.yaml")
        table = read_table(path)
        assert [(p.m, p.k, p.n) for p in table.points] == sorted(journal_points(out))
        assert table.incomplete == Incomplete(measured=3, of=7)
        assert f"wrote {path}, incomplete: 3 of 7 measurements\n" in command.said
    assert "4 measurements are missing: the same command takes them and completes the tables\n" in command.said

    finished = start()
    assert finished.exit_code() == 0, finished.said
    for path in out.rglob("*.yaml"):
        table = read_table(path)
        assert ([(p.m, p.k, p.n) for p in table.points], table.incomplete) == (SIX_SHAPES, None)


def test_an_incomplete_table_tells_its_grid_to_the_command_that_completes_it(start, calibrate, out, tmp_path):
    at_fourth = Gate(tmp_path / "gate", 4)
    command = start("--recipes", "rowwise", change=at_fourth)
    at_fourth.wait_for(command)
    command.press_ctrl_c()
    assert command.exit_code() == 130, command.said
    (path,) = out.rglob("rowwise.yaml")
    assert len(read_table(path).points) == 3
    finished = start("--recipes", "rowwise", "--grid", str(path))
    assert finished.exit_code() == 0, finished.said
    assert ([(p.m, p.k, p.n) for p in read_table(path).points], read_table(path).incomplete) == (SIX_SHAPES, None)


@pytest.mark.usefixtures("_quick_points")
def test_stopped_by_the_clock_it_says_so_and_goes_on(calibrate, grid_file, out):
    grid_file.write_text("shapes: [[32, 32, 32]]\n")
    stopped = calibrate("--stop-after", "0")
    assert stopped.exit_code == 1
    assert "2 points remain: run the same command to go on; no table was written" in stopped.stdout
    assert list(out.rglob("*.yaml")) == []
    finished, _ = finish(lambda: calibrate("--recipes", "rowwise"), out)
    assert finished.exit_code == 0
    assert "2 points measured, 0 taken from the journal" in finished.stdout
    (table,) = out.rglob("*.yaml")
    assert f"wrote {table}: " in finished.stdout


def test_the_summary_has_speedups_by_k_and_n(calibrate, monkeypatch):
    points = [make_point(32, k, n, k / n, spread=1.2) for k in (32, 48, 64) for n in (32, 64)]
    table = make_table(*points, make_point(32, 128, 64, 1.02, status="ambiguous"), recipe="tensorwise")
    sweep_comes_to(monkeypatch, tables={Path("tensorwise.yaml"): table})
    lines = calibrate("--recipes", "tensorwise").stdout.splitlines()
    assert lines[0] == "tensorwise speedup, 32 tokens"
    assert lines[1].split() == ["k", "\\", "n", "32", "64"]
    assert [line.split() for line in lines[3:7]] == [
        ["32", "1.00", "0.50"],
        ["48", "1.50", "0.75"],
        ["64", "2.00", "1.00"],
        ["128", "1.02?"],
    ]
    assert "wrote tensorwise.yaml: 1 ambiguous, 6 measured" in lines


def test_a_program_is_told_what_was_written_and_how_it_went(calibrate, monkeypatch, tmp_path):
    table = make_table(make_point(16, 32, 48), make_point(16, 32, 64, status="ambiguous"))
    outcome = swept_to(tables={tmp_path / "rowwise.yaml": table}, capped={LinearShape(1, 2, 3): "too large"})
    monkeypatch.setattr(sweep_module, "sweep", lambda *_, **__: outcome)
    result = calibrate("--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told["tables"] == {
        "rowwise": {"path": str(tmp_path / "rowwise.yaml"), "points": {"measured": 1, "ambiguous": 1}}
    }
    assert (told["report"]["measured"], told["report"]["timing_s"]) == (5, 7.0)
    assert (told["remaining"], told["capped"], told["off"]) == (0, {"(1, 2, 3)": "too large"}, {})


@pytest.mark.parametrize("outcome", [{"remaining": 3}, {"off": {LinearShape(16, 32, 48): 0.07}}])
def test_a_program_is_told_why_no_table_was_written(calibrate, monkeypatch, outcome):
    monkeypatch.setattr(sweep_module, "sweep", lambda *_, **__: swept_to(**outcome))
    result = calibrate("--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["tables"] == {}
    assert (told["remaining"], told["off"]) in [(3, {}), (0, {"(16, 32, 48)": 0.07})]


def test_ctrl_c_before_anything_is_measured(calibrate, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_module, "sweep", interrupted)
    result = calibrate()
    assert (result.exit_code, result.stderr) == (130, f"{GO_ON}\n")


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (
            ["--recipes", "rowwize"],
            "--recipes: expected some of tensorwise, rowwise, rowwise_with_gw_hp; got 'rowwize'",
        ),
        (["--recipes", "rowwise,"], "got ''"),
        (["--recipes", ""], "got ''"),
        (["--model", "llama3-8b"], "--model and --tokens go together"),
        (["--tokens", "8192"], "--model and --tokens go together"),
        (["--model", "llama4", "--tokens", "8192"], "expected a config.json or one of llama3-8b, "),
        (
            ["--model", "llama3-8b", "--tokens", "64", "--tp", "3"],
            "--tp: expected a divisor of the 32 heads of llama3-8b ($.num_attention_heads); got 3",
        ),
        (["--tp", "2"], "--tp: expected a --model whose shapes it divides; a grid's shapes are a rank's already"),
        (["--grid", "nosuch.yaml"], "expected quick, default, full or a readable YAML file; got 'nosuch.yaml'"),
    ],
)
def test_bad_input_is_one_clear_line(calibrate, swept, args, complaint):
    result = calibrate(*args)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("fp8gate: ")
    assert complaint in line
    assert swept == {}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("shapes: [[16, 16, 20]]", "n = 20"), ("m: [16]\nx: [16]", "`x`"), ("m: [16]\nk: [16]", "found no shape")],
)
def test_a_bad_grid_file_is_one_clear_line(calibrate, swept, grid_file, text, complaint):
    grid_file.write_text(text)
    result = calibrate()
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"fp8gate: {grid_file}: ")
    assert complaint in line
    assert swept == {}


@pytest.mark.parametrize(
    "args",
    [
        ["--tokens", "0"],
        ["--tp", "0"],
        ["--stop-after", "-1"],
        ["--workers", "-1"],
        ["--seed", "x"],
        ["--device", "tpu"],
        ["--no-such-option"],
    ],
)
def test_bad_options_are_usage_errors(calibrate, swept, args):
    result = calibrate(*args)
    assert result.exit_code == 2
    assert args[0] in result.stderr
    assert swept == {}


def test_a_gpu_that_is_not_there_is_an_error(calibrate, swept, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = calibrate("--device", "cuda")
    assert result.exit_code == 2
    assert result.stderr == "fp8gate: device: cuda was asked for, but torch sees no CUDA GPU here\n"
    assert swept == {}


@pytest.mark.parametrize("missing", [["torch"], ["pynvml"], ["torch", "torchao", "numpy", "pandas", "pynvml"]])
def test_without_the_extra_it_says_what_to_install(calibrate, swept, monkeypatch, missing):
    monkeypatch.setattr(options, "find_spec", lambda name: None if name in missing else object())
    result = calibrate()
    assert result.exit_code == 2
    assert (
        result.stderr == f"fp8gate: calibrate needs {', '.join(missing)}; in a checkout: pip install '.[calibrate]'\n"
    )
    assert swept == {}


def test_a_folder_that_cannot_be_written_is_an_error(calibrate, tmp_path):
    (tmp_path / "file").touch()
    result = calibrate("--out", str(tmp_path / "file" / "tables"))
    assert result.exit_code == 2
    assert str(tmp_path / "file") in result.stderr
    assert result.exception.__class__ is SystemExit


def test_what_keeps_it_from_measuring_is_one_clear_line(calibrate, monkeypatch):
    def nothing_can_be_measured(*_, **__):
        raise UnfinishedError("4 workers in a row died before their first point: its process ended with exit code 1")

    monkeypatch.setattr(sweep_module, "sweep", nothing_can_be_measured)
    result = calibrate("--workers", "2")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "fp8gate: 4 workers in a row died before their first point: its process ended with exit code 1"
    ]


def test_a_device_in_use_is_one_clear_line(calibrate, out):
    with DeviceLock(torch.device("cpu")) as lock:
        result = calibrate()
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"fp8gate: another sweep is measuring on this device: process {os.getpid()}")
    assert str(lock.path) in line
    assert not out.exists()


def sweep_comes_to(monkeypatch, **outcome):
    monkeypatch.setattr(sweep_module, "sweep", lambda *_, **__: swept_to(**outcome))


def test_what_was_done_is_said(calibrate, monkeypatch):
    sweep_comes_to(monkeypatch)
    result = calibrate()
    assert (result.exit_code, result.stdout) == (0, f"{REPORT.text()}\n")


def test_what_remains_is_said_and_is_no_success(calibrate, monkeypatch):
    sweep_comes_to(monkeypatch, remaining=3)
    result = calibrate()
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        *REPORT.text().splitlines(),
        "3 points remain: run the same command to go on; no table was written",
    ]


def test_incomplete_tables_are_counted_and_are_no_success(calibrate, monkeypatch, tmp_path):
    table = make_table(make_point(16, 32, 48), incomplete=Incomplete(measured=1, of=4))
    sweep_comes_to(monkeypatch, remaining=3, incomplete={tmp_path / "rowwise.yaml": table})
    result = calibrate()
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == (
        "3 points remain: run the same command to go on; 1 incomplete tables were written"
    )
    told = json.loads(calibrate("--json").stdout)
    assert told["tables"] == {}
    assert told["incomplete"] == {"rowwise": {"path": str(tmp_path / "rowwise.yaml"), "points": {"measured": 1}}}


def test_a_control_that_was_off_is_named_and_is_no_success(calibrate, monkeypatch):
    sweep_comes_to(monkeypatch, off={LinearShape(64, 32, 16): 0.0512, LinearShape(64, 32, 48): 0.25})
    result = calibrate()
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        *REPORT.text().splitlines(),
        "(64, 32, 16): bf16 against itself was 5.1% off, 3 times: no table was written",
        "(64, 32, 48): bf16 against itself was 25.0% off, 3 times: no table was written",
    ]


def test_the_options_reach_the_sweep(calibrate, swept, out):
    limits = ["--stop-after", "1.5", "--workers", "3", "--seed", "5"]
    result = calibrate("--recipes", "rowwise, tensorwise,rowwise", "--fresh", *limits)
    assert result.exit_code == 0
    assert swept["grid"] == Grid(m=(32,), k=(32, 48, 64), n=(32, 64))
    assert swept["shapes"] == [LinearShape(*shape) for shape in SIX_SHAPES]
    assert (swept["recipes"], swept["out"]) == (("tensorwise", "rowwise"), out)
    assert (swept["fresh"], swept["stop_after_s"]) == (True, 90.0)
    assert (swept["workers"], swept["seed"]) == (3, 5)
    assert (swept["device"], swept["setup"]) == (torch.device("cpu"), make_setup(torch.device("cpu")))


def test_the_defaults_are_all_recipes_going_on_without_a_limit(calibrate, swept):
    assert calibrate().exit_code == 0
    assert (swept["recipes"], swept["fresh"], swept["stop_after_s"]) == (tuple(RECIPES), False, None)
    assert (swept["workers"], swept["seed"]) == (None, 0)


def test_the_device_is_the_cpu_where_there_is_no_gpu(swept, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert CliRunner().invoke(app, ["calibrate", "--grid", "quick"]).exit_code == 0
    assert swept["device"] == torch.device("cpu")
    assert swept["grid"] == Grid(m=(64, 128), k=(128, 256), n=(128, 256))
    assert swept["out"] == ROOT / "thresholds"


@pytest.mark.parametrize(("args", "kinds"), [([], [None]), (["--device", "cpu"], ["cpu"]), (["--workers", "0"], [])])
def test_the_server_of_workers_starts_early_unless_there_are_none(swept, monkeypatch, args, kinds):
    started = []
    monkeypatch.setattr(forkserver, "start_early", started.append)
    assert CliRunner().invoke(app, ["calibrate", "--grid", "quick", *args]).exit_code == 0
    assert started == kinds


def test_a_models_local_shapes():
    assert model_shapes("llama3-8b", 8192, 8) == [
        LinearShape(8192, 4096, 512),  # wq
        LinearShape(8192, 4096, 128),  # wk
        LinearShape(8192, 4096, 128),  # wv
        LinearShape(8192, 512, 4096),  # wo
        LinearShape(8192, 4096, 1792),  # w1
        LinearShape(8192, 4096, 1792),  # w3
        LinearShape(8192, 1792, 4096),  # w2
        LinearShape(8192, 4096, 16032),  # output
    ]


def test_a_models_shapes_are_measured_beside_the_grids(calibrate, swept):
    assert calibrate("--model", "llama3-8b", "--tokens", "8192", "--tp", "8").exit_code == 0
    grid_shapes = [LinearShape(*shape) for shape in SIX_SHAPES]
    assert swept["shapes"] == [*grid_shapes, *model_shapes("llama3-8b", 8192, 8)]


def test_a_config_file_is_a_model_and_what_float8_cannot_compute_is_left_out(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY_CONFIG))
    shapes = model_shapes(str(config), 32, 1)
    assert set(shapes) == {LinearShape(32, *sizes) for sizes in ((64, 64), (64, 32), (64, 128), (128, 64))}
    assert LinearShape(32, 64, 100) not in shapes  # the output layer


def test_what_is_left_out_of_a_models_shapes_is_said(calibrate, swept, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY_CONFIG))
    result = calibrate("--model", str(config), "--tokens", "32")
    assert result.exit_code == 0
    assert result.stderr == "lm_head (32, 64, 100) is not measured: n = 100 is no multiple of 16\n"
    config.write_text(json.dumps({**TINY_CONFIG, "vocab_size": 128}))
    assert calibrate("--model", str(config), "--tokens", "32").stderr == ""


@pytest.mark.parametrize("args", [["--tp", "1"], ["--model", "llama3-8b", "--tokens", "64", "--tp", "2"]])
def test_a_degree_is_taken_where_there_is_something_to_divide(calibrate, swept, args):
    assert calibrate(*args).exit_code == 0
    assert swept["shapes"]


@pytest.mark.parametrize("model", BUNDLED)
def test_every_bundled_model_has_shapes(model):
    shapes = model_shapes(model, 4096, 1)
    assert len(shapes) in (5, 8)  # mixtral's experts are no linears
    assert {shape.m for shape in shapes} == {4096}
