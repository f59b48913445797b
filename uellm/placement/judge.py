"""Which of two layouts an objective prefers, and what speaks against the other."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uellm.placement.chain import Chain
from uellm.placement.costs import Costs
from uellm.placement.explain import bound_by, size
from uellm.placement.prediction import Layout, predict, shortages
from uellm.placement.views import Candidate, Objective

_EQUAL = 1e-9


@dataclass(frozen=True)
class Judge:
    """Judges layouts of one replica.

    Attributes:
        costs: of the model.
        chain: which workers and pins bind.
        objective: what is sought.
        limit: longest latency in seconds; inf: none.
        stages: devices that a layout must have; 0: any number.
    """

    costs: Costs
    chain: Chain
    objective: Objective
    limit: float = np.inf
    stages: int = 0

    def cost(self, layout: Layout) -> float:
        """Of the devices used."""
        return float(self.costs.price[np.asarray(layout.order)].sum())

    def violation(self, layout: Layout) -> str:
        """The constraint that a layout does not keep, or ""."""
        lacking = shortages(self.costs, layout)
        if lacking:
            worst = max(lacking, key=lambda name: (lacking[name], name))
            return f"memory: {worst} lacks {size(lacking[worst])}"
        if not self.chain.allows(layout.order):
            return "a worker would hold two stages apart, or a pinned device is not used"
        ends = self.chain.caps(layout.order)
        if min(ends) < 1:
            return "another device is pinned to its end"
        if self.stages and len(layout.order) != self.stages:
            return f"{len(layout.order)} stages instead of {self.stages}"
        seconds = predict(self.costs, layout).total_seconds
        if seconds > self.limit * (1 + _EQUAL):
            return f"latency: {seconds:.3g} s exceed the {self.limit:.3g} s allowed"
        return ""

    def key(self, layout: Layout) -> tuple[float, float]:
        """Less is better, of layouts that keep all constraints."""
        found = predict(self.costs, layout)
        if self.objective == "lr":
            return found.total_seconds, self.cost(layout)
        if self.objective in ("he", "helr"):
            return self.cost(layout), found.total_seconds
        return -found.tokens_per_second, found.total_seconds

    def best(self, layouts: Sequence[Layout]) -> Layout | None:
        """The one that is preferred; None if none keeps the constraints."""
        fine = [layout for layout in layouts if not self.violation(layout)]
        return min(fine, key=self.key, default=None)

    def candidate(self, name: str, layout: Layout | None, chosen: Layout) -> Candidate:
        """A layout that was not chosen, and why."""
        if layout is None:
            return Candidate(name, (), (), np.inf, 0.0, "memory: its rule leaves layers over")
        found = predict(self.costs, layout)
        violation = self.violation(layout)
        fits = not shortages(self.costs, layout)
        return Candidate(
            name=name,
            device_ids=tuple(self.costs.devices[d].id for d in layout.order),
            num_layers=layout.layers,
            total_seconds=found.total_seconds if fits else np.inf,
            tokens_per_second=found.tokens_per_second if fits else 0.0,
            ruled_out=violation or self._worse(layout, chosen),
        )

    def _worse(self, layout: Layout, chosen: Layout) -> str:
        mine, best = predict(self.costs, layout), predict(self.costs, chosen)
        cost, least = self.cost(layout), self.cost(chosen)
        if self.objective in ("he", "helr") and cost > least * (1 + _EQUAL):
            return f"cost: {cost:g} instead of {least:g}"
        if self.objective in ("throughput", "goodput"):
            ratio = best.tokens_per_second / mine.tokens_per_second
            if ratio > 1 + _EQUAL:
                return f"throughput: {1 / ratio:.3g} times, {bound_by(mine.bottleneck)}"
        ratio = mine.total_seconds / best.total_seconds
        if ratio > 1 + _EQUAL:
            return f"latency: {ratio:.4g} times"
        return "no better"
