"""Chains by OR-tools' CP-SAT, where it is installed (the extra ``placement``).

A chain is a circuit through a depot; a device that is not used loops on itself. One thread, a fixed
seed and a limit in the solver's own deterministic time: equal problems have equal answers.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np

from uellm.placement.arrays import Array, Integers
from uellm.placement.budget import Budget
from uellm.placement.chain import Chain, Route, route

MOST_DEVICES = 32
# Seconds become whole numbers, so many to those of the hint; rounded down, they bound from below.
_RESOLUTION = 1e6


@dataclass(frozen=True, slots=True)
class CpResult:
    """The best route that was found, and what no route can be better than."""

    route: Route
    bound: float


def available() -> bool:
    """Whether OR-tools is installed."""
    return importlib.util.find_spec("ortools") is not None


def solve_cpsat(chain: Chain, hint: Route, budget: Budget) -> CpResult:
    """Improve a route, and bound what can be reached.

    Args:
        chain: the problem.
        hint: a route of it.
        budget: deterministic time of the solver is about seconds of it; a clock ends it too.
    """
    from ortools.sat.python import cp_model  # noqa: PLC0415 - an extra, and half a second to import

    circuit = _Circuit(cp_model.CpModel(), chain, hint)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.max_deterministic_time = budget.left
    if np.isfinite(budget.clock_left):
        solver.parameters.max_time_in_seconds = budget.clock_left
    status = solver.solve(circuit.model)
    budget.spend(solver.deterministic_time)
    if status != cp_model.OPTIMAL:
        budget.cut()
    found: Route | None = None
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        found = route(chain, circuit.order(solver))
    best = found if found is not None and found.seconds < hint.seconds else hint
    return CpResult(best, solver.best_objective_bound / circuit.scale)


class _Circuit:
    """The model: an arc for each way, a count of layers for each device."""

    def __init__(self, model: Any, chain: Chain, hint: Route) -> None:
        self.model = model
        self.scale = _RESOLUTION / max(abs(hint.seconds), 1e-300)
        self._chain = chain
        self._depot = chain.size
        self._costs: list[Any] = []
        self._arcs = self._add_arcs(hint)
        model.add_circuit([(i, j, arc) for (i, j), arc in self._arcs.items()])
        hinted = dict(zip(hint.order, hint.layers, strict=True))
        layers = [self._add_layers(d, hinted.get(d, 0)) for d in range(chain.size)]
        model.add(sum(layers) == chain.num_layers)
        self._keep_workers_together()
        self._go_back(hint)
        model.minimize(sum(self._costs))

    def order(self, solver: Any) -> list[int]:
        """The devices of a solution."""
        after = {i: j for (i, j), arc in self._arcs.items() if i != j and solver.boolean_value(arc)}
        order, at = [], after[self._depot]
        while at != self._depot:
            order.append(at)
            at = after[at]
        return order

    def _add_arcs(self, hint: Route) -> dict[tuple[int, int], Any]:
        chain, depot = self._chain, self._depot
        link = np.zeros((depot + 1, depot + 1))
        link[:depot, :depot] = chain.link
        link[:depot, depot], link[depot, :depot] = chain.last, chain.first
        np.fill_diagonal(link, 0.0)
        hinted = set(zip((depot, *hint.order), (*hint.order, depot), strict=True))
        hinted |= {(d, d) for d in range(depot) if d not in hint.order}
        arcs = {}
        for i in range(depot + 1):
            for j in range(depot + 1):
                if np.isfinite(link[i, j]) and not i == j == depot:
                    arcs[i, j] = self.model.new_bool_var("")
                    self.model.add_hint(arcs[i, j], (i, j) in hinted)
                    self._cost(link[i, j], arcs[i, j])
        return arcs

    def _add_layers(self, device: int, hinted: int) -> Any:
        model, chain = self.model, self._chain
        used = self._arcs[device, device].negated()
        first, last = self._arcs[self._depot, device], self._arcs[device, self._depot]
        middle, only = int(chain.middle_cap[device]), int(chain.only_cap[device])
        count = model.new_int_var(0, max(middle, only), "")
        model.add_hint(count, hinted)
        model.add(count == 0).only_enforce_if(used.negated())
        model.add(count >= 1).only_enforce_if(used)
        model.add(count <= middle).only_enforce_if(used)
        model.add(count <= int(chain.first_cap[device])).only_enforce_if(first)
        model.add(count <= int(chain.last_cap[device])).only_enforce_if(last)
        model.add(count <= only).only_enforce_if(first, last)
        if chain.required[device]:
            model.add(used == 1)
        self._cost(float(chain.layer[device]), count)
        self._cost(float(chain.fixed[device]), used)
        return count

    def _keep_workers_together(self) -> None:
        groups = self._chain.group
        for group in np.unique(groups):
            inside = set(np.flatnonzero(groups == group).tolist())
            into = [arc for (i, j), arc in self._arcs.items() if j in inside and i not in inside]
            if len(inside) > 1:
                self.model.add(sum(into) <= 1)

    def _go_back(self, hint: Route) -> None:
        """The way from the last device to the first: no less than that from it to whoever is."""
        back, depot = self._scaled(self._chain.back), self._depot
        most = int(back.max(initial=0))
        if not most:
            return
        way = self.model.new_int_var(0, most, "")
        self.model.add_hint(way, int(back[hint.order[-1], hint.order[0]]))
        for last in range(depot):
            ways = [int(back[last, first]) * self._arcs[depot, first] for first in range(depot)]
            self.model.add(way >= sum(ways)).only_enforce_if(self._arcs[last, depot])
        self._costs.append(way)

    def _scaled(self, seconds: Array) -> Integers:
        return np.floor(self.scale * seconds).astype(np.int64)

    def _cost(self, seconds: float, variable: Any) -> None:
        self._costs.append(int(np.floor(self.scale * seconds)) * variable)
