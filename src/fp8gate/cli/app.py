"""The commands as one program. This is the one place where an error becomes a line on standard error and an exit code.

Try it: fp8gate --help
"""

from __future__ import annotations

import contextlib
import inspect
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import fp8gate
from fp8gate.calibrate.processes import library_noise  # noqa: F401  # its effect is wanted, before torch is imported
from fp8gate.cli.breakdown import breakdown_command
from fp8gate.cli.calibrate import calibrate_command
from fp8gate.cli.diff import diff_command
from fp8gate.cli.doctor import doctor_command
from fp8gate.cli.explain import explain_command
from fp8gate.cli.merge import merge_command
from fp8gate.cli.plan import plan_command
from fp8gate.cli.report import report_command
from fp8gate.cli.verify import verify_command
from fp8gate.filter.contract.errors import EXIT_FOUND, EXIT_INTERRUPTED, EXIT_USAGE, InputError, UnfinishedError

COMMANDS: dict[str, Callable[..., None]] = {
    "calibrate": calibrate_command,
    "merge": merge_command,
    "diff": diff_command,
    "report": report_command,
    "verify": verify_command,
    "breakdown": breakdown_command,
    "explain": explain_command,
    "plan": plan_command,
    "doctor": doctor_command,
}
"""In the order in which --help lists them."""
WITH_JOURNAL = ("calibrate", "plan")
"""The commands that keep what they have measured when they are stopped."""


class EndedBySignal(BaseException):
    """A signal asks the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Commands(TyperGroup):
    """All commands. An error that a user can do something about ends them with one line; a bug shows its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with _raised_signals():
                return super().invoke(ctx)
        except (KeyboardInterrupt, EndedBySignal, Exception) as error:
            ending = _ending(error, has_journal=ctx.invoked_subcommand in WITH_JOURNAL)
            if ending is None:
                raise
            message, exit_code = ending
            typer.echo(f"fp8gate: {message}", err=True)
            raise typer.Exit(exit_code) from error


def _ending(error: BaseException, *, has_journal: bool) -> tuple[str, int] | None:
    """The message and the exit code; None for a bug, for typer's own exceptions, and for a pipe that was closed."""
    match error:
        case InputError():
            return error.on_command_line or str(error), error.exit_code
        case UnfinishedError():
            return str(error), error.exit_code
        case KeyboardInterrupt():
            return f"stopped{_kept(has_journal)}", EXIT_INTERRUPTED
        case EndedBySignal():
            return f"ended by {error}{_kept(has_journal)}", 128 + error.number
        case BrokenPipeError():  # the reader of the output has ended, as `head` does: typer exits without a message
            return None
        case OSError():
            return str(error), EXIT_USAGE
        case RuntimeError() if _comes_from_the_device(error):
            go_on = "; run the same command to go on" if has_journal else ""
            return f"the device failed: {error}{go_on}", EXIT_FOUND
    return None


def _kept(has_journal: bool) -> str:
    return "; what was measured is in the journal: run the same command to go on" if has_journal else ""


@contextlib.contextmanager
def _raised_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command as Ctrl-C does: its children end, and its temporary files go."""

    def end(number: int, frame: object) -> NoReturn:
        raise EndedBySignal(number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    asked = (signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in asked if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    earlier = {number: signal.signal(number, end) for number in heard}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _comes_from_the_device(error: RuntimeError) -> bool:
    """Whether torch reports that the device's memory is full or that the device does not answer.

    The libraries under torch, such as cuBLAS, report it by a plain RuntimeError whose text begins with "CUDA error".
    This process has imported torch if torch has raised the error: asking for help does not import it.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    return isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)) or str(error).startswith("CUDA error")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fp8gate {fp8gate.__version__}")
        raise typer.Exit


def main_command(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Measure where float8 linears train faster than bf16 on this GPU, and convert only those.

    Exit codes: 0 fine; 1 findings, or stopped before the end; 2 usage or bad input; 130 Ctrl-C.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


HELP_NAMES = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(cls=Commands, pretty_exceptions_enable=False, rich_markup_mode=None, context_settings=HELP_NAMES)
app.callback(invoke_without_command=True)(main_command)
for _name, _command in COMMANDS.items():
    _first_sentence = (inspect.getdoc(_command) or "").partition("\n\n")[0]
    app.command(_name, context_settings=HELP_NAMES, short_help=_first_sentence)(_command)
