"""Turn the plans of a model, one for each kind of its layers, into decisions for the linears of its blocks. Pure.

In: the plans, and the linears of a model by name. Out: decisions, and findings if the model is not the one that was
measured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from fp8gate.filter.contract.names import plain_name, without_indices
from fp8gate.filter.contract.plans.layer_names import LayerNames
from fp8gate.filter.contract.plans.plan_file import Plans
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.decision.decide import Decision
from fp8gate.filter.planned.kind_decisions import Decisions, KindDecisions, Shapes, mismatch_finding
from fp8gate.filter.policy.findings import Finding


class ModelPlans:
    """Turns the plans of a model, one for each kind of its layers, into decisions.

    Until `decide_blocks` has seen a model, `decide` takes every block for one in which all of a plan's set can be
    converted. source: what messages call the plans. missing: layers that were not planned yet; the table decides them.
    recomputes: whether the forward of a linear runs twice, by its name
    without wrappers.
    """

    def __init__(self, plans: Plans, source: str, recomputes: Callable[[str], bool], *, is_found: bool = False) -> None:
        """is_found: nobody gave them: they fit all blocks, and have nothing to say of what is in none."""
        self.source, self.model, self.missing = source, plans[0].model, plans[0].missing
        self._missing = [LayerNames(layers) for layers in self.missing]
        self._every = [KindDecisions(plan, source, recomputes, is_found=is_found) for plan in plans]
        self._kinds = self._every

    @property
    def plans(self) -> Plans:
        """Those that decide: all of them, or those of the lists of layers that fit the model that `fits` saw last."""
        return tuple(kind.plan for kind in self._kinds)

    @property
    def of_file(self) -> Plans:
        """All that were given, whichever of them decide."""
        return tuple(kind.plan for kind in self._every)

    def fits(
        self,
        shapes: Shapes,
        left_alone: Collection[str] | None,
        leaves_out: Callable[[str], bool] = lambda fqn: False,
    ) -> bool:
        """Whether a list of a model's layers has only blocks that were measured: their roles, shapes, recomputation.

        A linear that holds several roles needs a measured set with all or none of them. A model may have several lists,
        such as a vision tower's and the text's. Those that do not fit are the table's. Of layers that were not planned
        yet, nothing is known that could fit.
        shapes: what a rank multiplies in each linear of the model, by name; None for one that no plan can decide.
        left_alone: names of the modules that hold several matrices in one parameter, layer indices as *; None if they
        are not known. leaves_out: whether the user leaves a linear in bf16; a plan that left out others does not fit.
        """
        self._kinds = self._every
        lists = {kind.layers: kind.layer_names for kind in self._every}
        for fqn, shape in shapes.items():
            kind = self._kind_of(fqn)
            if kind is None and not self._is_missing(fqn):
                lists = {name: layers for name, layers in lists.items() if not layers.split(plain_name(fqn))}
            elif kind and kind.layers in lists and not kind.has_measured(fqn, shape):
                del lists[kind.layers]
            if not lists:  # most plans of other models differ at the first linear
                return False
        fitting = [name for name in lists if self._has_whole_blocks(name, shapes, left_alone, leaves_out)]
        self._kinds = [kind for kind in self._every if kind.layers in fitting]
        return bool(fitting)

    def _has_whole_blocks(
        self,
        layers: str,
        linears: Collection[str],
        left_alone: Collection[str] | None,
        leaves_out: Callable[[str], bool],
    ) -> bool:
        """Whether the model has this list of layers, each block with all roles and the experts that were measured."""
        present = [kind for kind in self._every if kind.layers == layers and kind.blocks(linears)]
        if left_alone is not None:
            places = (LayerNames(layers).split(plain_name(fqn)) for fqn in left_alone)
            there = {place.inner for place in places if place}
            measured = {one for kind in present for one in kind.plan.left_alone}
            if not (there >= measured if self.missing else there == measured):  # others may be of missing layers
                return False
        return bool(present) and all(kind.has_whole_blocks(linears, leaves_out) for kind in present)

    def remarks(self) -> tuple[str, ...]:
        """What blocks convert in place of their plan's own set, once `decide_blocks` has seen them."""
        return tuple(dict.fromkeys(remark for kind in self._kinds for remark in kind.remarks()))

    def forget(self) -> None:
        """Prepare for another model: none of its blocks is decided."""
        self._kinds = self._every
        for kind in self._kinds:
            kind.forget()

    def decide(self, fqn: str, shape: LinearShape) -> Decision | Finding | None:
        """The plan's decision for one linear. None if the table decides.

        If the linear could be mistaken for one of a plan's, a finding says why it is another, and the table decides.
        """
        kind = self._kind_of(fqn)
        if kind is None and self._is_missing(fqn):
            return None
        if kind is None and self._is_of_the_layers(fqn):
            known = ", ".join(plan.layers for plan in self.plans)
            message = f"$.layers: {without_indices(fqn)} is in other layers than {known}; the table decides"
            return mismatch_finding(self.source, message)
        if kind is None:
            answers = [one.decide(fqn, shape) for one in self._kinds]
            return next((answer for answer in answers if answer is not None), None)
        return kind.decide(fqn, shape)

    def decide_blocks(self, shapes: Shapes, stays: Callable[[str], bool]) -> None:
        """Settle what each block of a model converts.

        shapes: what a rank multiplies in each linear of the model, by name; None if that is not known. stays: whether a
        linear stays in bf16, whatever a plan says.
        """
        for kind in self._kinds:
            kind.decide_blocks(shapes, stays)

    def findings(self, decisions: Decisions) -> Iterator[Finding]:
        """The blocks that convert another set than their plan's, and a model that has none of the plans' roles.

        A block that `filter_fqns` leaves out as a whole is no finding.
        """
        if not any(kind.has_roles(decisions) for kind in self._kinds):
            role = next(iter(self.plans[0].shapes))
            yield mismatch_finding(self.source, f"$.shapes: no linear has any of its roles, such as {role}")
        for kind in self._kinds:
            yield from kind.findings(decisions)

    def _kind_of(self, fqn: str) -> KindDecisions | None:
        return next((kind for kind in self._kinds if kind.has(fqn)), None)

    def _is_missing(self, fqn: str) -> bool:
        """Whether it is in a layer that was not planned yet."""
        return any(names.split(plain_name(fqn)) for names in self._missing)

    def _is_of_the_layers(self, fqn: str) -> bool:
        """Whether it is in a list of layers that the plans are about, in a layer that is in none of them."""
        return any(kind.layer_names.split(plain_name(fqn)) for kind in self._kinds)
