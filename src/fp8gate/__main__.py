"""`python -m fp8gate`: the command line."""

from fp8gate.cli import app

if __name__ == "__main__":
    app(prog_name="fp8gate")
