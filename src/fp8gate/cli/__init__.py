"""The command line: one file a command, what several commands share in `options`, the errors' way out in `app`."""

from fp8gate.cli.app import app

__all__ = ["app"]
