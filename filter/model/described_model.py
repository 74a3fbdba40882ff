"""A model as `explain` and `calibrate` see it: kinds of linears, how many there are, and what they multiply. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.model.observed import Observation
from fp8gate.filter.model.parallel import ShardError, Shards


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearRole:
    """All linears of one kind in a model.

    role: a short name for them: Llama's, such as "wq", or their name within a block. fqn: their name in the model,
    layer indices as *. count: how many there are. in_features, out_features: of the whole linear, before it is divided
    among ranks. rows: of its input for one microbatch; None for the tokens. known_names: of all of them in the model;
    empty if they are `fqn` with the indices from 0 on.
    """

    role: str
    fqn: str
    count: int
    in_features: int
    out_features: int
    rows: int | None = None
    known_names: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all of them in the model; of one that stands for all if only their number is known."""
        if self.known_names:
            return self.known_names
        indices = range(self.count) if self.fqn.count("*") == 1 else range(1)
        return tuple(self.fqn.replace("*", str(i)) for i in indices)

    @property
    def name(self) -> str:
        """The name of one of them in the model."""
        return self.names[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class DescribedModel:
    """The linears of a model, in forward order, and how it is divided.

    name: what the user calls it. parallel_plan: how tensor parallelism divides it, as `Parallel` takes it. observation:
    what a forward has shown of the linears, by `name`; None if none was run. has_config: `fp8gate plan` and `fp8gate
    calibrate --model` take it. heads: field of its config -> heads of attention, which a degree must divide. note: what
    is no linear, or None.
    """

    name: str
    linears: tuple[LinearRole, ...]
    parallel_plan: Mapping[str, str] | str = "transformers"
    observation: Observation | None = None
    heads: Mapping[str, int] = field(default_factory=dict)
    note: str | None = None
    has_config: bool = True

    def require_divisible(self, tp: int) -> None:
        """Raises ShardError if tensor parallelism of this degree would cut through heads: a rank holds whole ones."""
        for field_name, heads in self.heads.items():
            if heads % tp:
                raise ShardError(
                    f"--tp: expected a divisor of the {heads} heads of {self.name} ($.{field_name}); got {tp}"
                )


def role_shape(linear: LinearRole, shards: Shards) -> LinearShape:
    """The shape of a role's linears on one rank. Raises ShardError, which names the linear, if it cannot be divided."""
    try:
        return shards.part(shards.style(linear.fqn), linear.in_features, linear.out_features, linear.rows)
    except ShardError as error:
        raise ShardError(f"{linear.fqn}: {error}") from error
