"""`fp8gate doctor`: say what is here, what the filter would find, and what to run next.

`checkup` asks the machine, `next_steps` says what follows from that, `text` shows both, `command` is the command.
Try it: fp8gate doctor
"""

from fp8gate.cli.doctor.command import doctor_command

__all__ = ["doctor_command"]
