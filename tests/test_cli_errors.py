"""How a command ends early: one line on standard error and an exit code, or the traceback of a bug."""

from __future__ import annotations

import errno

import pytest
import torch
import typer
from samples import python
from typer.testing import CliRunner

from fp8gate.cli.app import COMMANDS, WITH_JOURNAL, Commands
from fp8gate.filter.contract.errors import EXIT_FOUND, InputError, UnfinishedError
from fp8gate.filter.contract.table import TableError

GO_ON = "what was measured is in the journal: run the same command to go on"


@pytest.fixture
def end_with():
    """Runs a command that raises this error, under this name."""

    def run(error: BaseException, command: str = "explain"):
        def fail() -> None:
            raise error

        failing = typer.Typer(cls=Commands, pretty_exceptions_enable=False)
        failing.command(command)(fail)
        failing.command("another")(lambda: None)  # typer makes no group of a single command
        return CliRunner().invoke(failing, [command])

    return run


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (InputError("--tp: expected less"), 2, "fp8gate: --tp: expected less"),
        (TableError("a.yaml: $.schema: expected 1"), 2, "fp8gate: a.yaml: $.schema: expected 1"),
        (UnfinishedError("the time is up"), 1, "fp8gate: the time is up"),
        (PermissionError(13, "Permission denied", "out"), 2, "fp8gate: [Errno 13] Permission denied: 'out'"),
        (KeyboardInterrupt(), 130, "fp8gate: stopped"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "fp8gate: the device failed: CUDA out of memory"),
        (torch.AcceleratorError("CUDA error: gone"), 1, "fp8gate: the device failed: CUDA error: gone"),
        (RuntimeError("CUDA error: CUBLAS_STATUS"), 1, "fp8gate: the device failed: CUDA error: CUBLAS_STATUS"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(end_with, error, exit_code, line):
    result = end_with(error)
    assert (result.exit_code, result.stderr, result.stdout) == (exit_code, f"{line}\n", "")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_only_a_command_with_a_journal_is_told_to_go_on(end_with, command):
    stopped = end_with(KeyboardInterrupt(), command).stderr
    lost = end_with(torch.OutOfMemoryError("full"), command).stderr
    if command in ("calibrate", "plan"):
        assert (stopped, lost) == (
            f"fp8gate: stopped; {GO_ON}\n",
            "fp8gate: the device failed: full; run the same command to go on\n",
        )
    else:
        assert (stopped, lost) == ("fp8gate: stopped\n", "fp8gate: the device failed: full\n")


def test_the_commands_with_a_journal_exist():
    assert set(WITH_JOURNAL) < set(COMMANDS)


@pytest.mark.parametrize("error", [RuntimeError("an invariant is broken"), KeyError("m"), AssertionError()])
def test_a_bug_shows_its_traceback(end_with, error):
    result = end_with(error)
    assert result.exception is error
    assert result.stderr == ""


@pytest.mark.parametrize("exit_code", [0, EXIT_FOUND])
def test_findings_end_a_command_without_a_message(end_with, exit_code):
    result = end_with(typer.Exit(exit_code))
    assert (result.exit_code, result.output) == (exit_code, "")


def test_a_reader_that_has_closed_the_pipe_is_not_told_of_it(end_with):
    """As in `fp8gate explain ... | head -1`."""
    result = end_with(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert (result.exit_code, result.output) == (1, "")


def loaded_after(*args: str) -> set[str]:
    """The packages that a fresh Python has loaded after running the command."""
    code = (
        "import sys\nfrom fp8gate.cli import app\n"
        "try:\n    app()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print(' '.join({name.split('.')[0] for name in sys.modules}))"
    )
    process = python("-c", code, *args)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return set(output.splitlines()[-1].split())


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["calibrate", "--help"],
        ["verify", "--files"],
        ["explain", "llama3-8b", "--recipe", "all", "--tokens", "8192", "--device", "NVIDIA H200"],
    ],
)
def test_what_measures_nothing_loads_no_torch(args):
    loaded = loaded_after(*args)
    assert "fp8gate" in loaded
    assert loaded & {"torch", "torchao", "triton", "pandas", "numpy"} == set()
