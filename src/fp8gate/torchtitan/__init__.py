"""torchtitan, by an option of its command line: convert the linears that were measured to win.

torchtitan (0.3.0) runs an override on configs of the run before it builds anything:

    --override.imports 'fp8gate.torchtitan.gate={"recipe": "rowwise"}'

`gate` finds the model, its tokens, its parallelism and its recomputation in the run's own config. Its keys are the
fields of `GateSettings`.
"""

from __future__ import annotations

from abc import ABCMeta
from typing import Any

try:
    from torchtitan.config import CompileConfig, Configurable, ParallelismConfig, TrainingConfig, override
except ImportError as error:
    raise ImportError(f"fp8gate.torchtitan needs torchtitan 0.3.0: pip install torchtitan==0.3.0 ({error})") from error
from torchtitan.distributed.activation_checkpoint import ActivationCheckpointing
from torchtitan.protocols.model import BaseModel

from fp8gate.torchtitan.conversion import convert_model
from fp8gate.torchtitan.gate_settings import GateSettings, read_settings
from fp8gate.torchtitan.run import read_run

__all__ = ["GateSettings", "RunPart", "gate"]

_PARTS = {
    "model": BaseModel.Config,
    "training": TrainingConfig,
    "parallelism": ParallelismConfig,
    "activation_checkpoint": ActivationCheckpointing.Config,
    "compile": CompileConfig,
}
"""The parts of a run's config that decide, in the order in which torchtitan hands them to an override."""
_LAST = "compile"


class RunPart(Configurable.Config, metaclass=ABCMeta):  # type: ignore[misc]  # mypy does not follow torchtitan
    """What `gate` has to see. torchtitan hands an override each config of the run that is an instance of its target.

    The parts have no class in common that the whole run's config, which cannot be overridden, does not have too. So
    this abstract class has them as virtual subclasses.
    """


for _part in _PARTS.values():
    RunPart.register(_part)

_collected: dict[str, Any] = {}
"""The parts of the run that is being configured. torchtitan hands them over one at a time, the model first."""


@override(target=RunPart, description="linears that were measured to win in float8")  # type: ignore[untyped-decorator]
def gate(config: Any, **settings: Any) -> Any:
    """Convert the linears of a model's config to float8 that win, once all parts of the run are known.

    config: one part of the run, which is returned; the model's is changed in place. settings: see `GateSettings`.
    Raises InputError for settings that are wrong, or not those of the run; the error names the key. Raises what
    `fp8gate.auto_filter` and its `check` raise, and RanksDisagreeError if ranks would convert different layers.
    """
    part = next(name for name, kind in _PARTS.items() if isinstance(config, kind))
    if part == "model":
        _collected.clear()  # another run may have ended in an error
    read = read_settings(settings)
    _collected[part] = config
    if part == _LAST:
        run = read_run(_collected)
        _collected.clear()
        convert_model(run, read)
    return config
