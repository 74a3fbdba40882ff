"""The `fp8gate calibrate` command that measures the shapes of a model. Pure.

In: a model's config and the settings of a training. Out: a command for a shell.
"""

from __future__ import annotations

import shlex

from fp8gate.filter.policy.settings import FilterSettings


def shapes_command(config: str, settings: FilterSettings) -> str:
    """For Inductor's casts; those of others have `Variant.option` behind it.

    config: a bundled model's name, or the path of a config.json.
    """
    parallel = settings.parallel
    words = ["fp8gate", "calibrate", "--model", config, "--tokens", f"{settings.tokens // parallel.cp}"]
    return shlex.join([*words, *(["--tp", f"{parallel.tp}"] if parallel.tp > 1 else [])])
