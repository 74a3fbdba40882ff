"""`fp8gate` and `python -m fp8gate`: the command line. Ctrl-C ends it alike while it imports and while it works."""

import sys

EXIT_INTERRUPTED = 130  # as in filter.contract.errors, which may be what is being imported


def main() -> None:
    try:
        from fp8gate.cli import app

        app(prog_name="fp8gate")
    except KeyboardInterrupt:
        print("fp8gate: stopped", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
