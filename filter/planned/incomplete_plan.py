"""What to say of plans whose search was stopped: how far it came, and what completes it.

In: the plans of a model and the name of their file. Out: a sentence, or nothing for complete plans.
"""

from __future__ import annotations

from pathlib import Path

from fp8gate.filter.contract.devices import device_slug
from fp8gate.filter.contract.plans.plan import PLANS
from fp8gate.filter.contract.plans.plan_file import Plans, are_complete
from fp8gate.filter.locate.incomplete_table import out_option
from fp8gate.filter.planned.planning_command import command_again


def incomplete_remark(plans: Plans, source: str, command: str) -> str | None:
    """How far the search for the plans came, and what completes it. None for complete plans.

    source: their file, or another name of theirs. command: what completes them.
    """
    if are_complete(plans):
        return None
    missing = plans[0].missing
    instead = f"; the table decides {' and '.join(missing)}" if missing else ""
    return (
        f"{source} is incomplete, its search was stopped with {how_far(plans)}{instead}; to complete it, run on "
        f"{plans[0].device.name}: {command}"
    )


def how_far(plans: Plans) -> str:
    """ "45 visits of model.layers.1-45, nothing of model.layers.46": the kinds of layers that are not complete."""
    stopped = [" of ".join(filter(None, (f"{plan.visits} visits", plan.layers))) for plan in plans if plan.incomplete]
    return ", ".join([*stopped, *(f"nothing of {layers}" for layers in plans[0].missing)])


def completing_plan_command(plans: Plans, source: str) -> str:
    """The command that goes on with the plans of a file, with the folder if it would write elsewhere by itself."""
    folder = Path(source).absolute().parent
    lies_in_out = (folder.parent.name, folder.name) == (device_slug(plans[0].device.name), PLANS)
    return command_again(plans) + (out_option(folder.parent.parent) if lies_in_out else "")
