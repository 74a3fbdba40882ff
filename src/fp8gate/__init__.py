"""fp8gate: convert to float8 only the linear layers that were measured to train faster on your GPU.

from fp8gate import auto_filter
convert_to_float8_training(model, module_filter_fn=auto_filter("rowwise", tokens=8192))
"""

from fp8gate.filter.auto_filter import auto_filter
from fp8gate.filter.contract.plans.plan import Plan, PlanError
from fp8gate.filter.contract.plans.plan_file import read_plan, read_plans
from fp8gate.filter.contract.table import Table, TableError, read_table
from fp8gate.filter.decision.decide import Decision
from fp8gate.filter.layer_filter import AutoFilter
from fp8gate.filter.model.observed import ObserveError
from fp8gate.filter.model.parallel import Parallel, ShardError
from fp8gate.filter.policy.findings import (
    AmbiguousPointWarning,
    FilterWarning,
    Finding,
    IncompleteTableWarning,
    MissingPointWarning,
    NothingConvertedWarning,
    NotPlainLinearWarning,
    OutsideGridWarning,
    PlanMismatchWarning,
    StaleTableWarning,
    UnknownRowsWarning,
    UnknownShardWarning,
    UnmatchedPatternWarning,
    UnmeasuredSettingWarning,
)
from fp8gate.filter.policy.settings import Recompute
from fp8gate.filter.ranks.agreement import RanksDisagreeError, RanksMissingError

__version__ = "0.1.0"

__all__ = [
    "AmbiguousPointWarning",
    "AutoFilter",
    "Decision",
    "FilterWarning",
    "Finding",
    "IncompleteTableWarning",
    "MissingPointWarning",
    "NotPlainLinearWarning",
    "NothingConvertedWarning",
    "ObserveError",
    "OutsideGridWarning",
    "Parallel",
    "Plan",
    "PlanError",
    "PlanMismatchWarning",
    "RanksDisagreeError",
    "RanksMissingError",
    "Recompute",
    "ShardError",
    "StaleTableWarning",
    "UnknownRowsWarning",
    "UnknownShardWarning",
    "Table",
    "TableError",
    "UnmatchedPatternWarning",
    "UnmeasuredSettingWarning",
    "__version__",
    "auto_filter",
    "read_plan",
    "read_plans",
    "read_table",
]
