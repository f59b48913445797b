"""Placements to compare, and what the planner predicts of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from benchmarks.probed_anew import probed_anew
from uellm.cli.discovered import Discovered
from uellm.models.profile import read_profile
from uellm.placement.placers import ObjectivePlacer, improvement, rated
from uellm.placement.solver import solve
from uellm.placement.topology import Topology
from uellm.placement.views import (
    LayerTimes,
    Objective,
    Plan,
    PlannedReplica,
    PlannedStage,
    PlanRequest,
    Workload,
)
from uellm.placement.what_if import changed, parse_change


@dataclass(frozen=True, slots=True)
class Layout:
    """Devices in stage order, and the layers of each."""

    name: str
    devices: tuple[str, ...]
    layers: tuple[int, ...]

    @classmethod
    def of(cls, name: str, replica: PlannedReplica) -> "Layout":
        """A planned replica's."""
        counts = [stage.last_layer - stage.first_layer + 1 for stage in replica.stages]
        return cls(name, tuple(stage.device_id for stage in replica.stages), tuple(counts))

    def replica(self) -> PlannedReplica:
        """As plans have it, without figures."""
        last = len(self.devices) - 1
        ranges = pairwise(accumulate(self.layers, initial=0))
        return PlannedReplica(
            tuple(
                PlannedStage(device, first, end - 1, index == 0, index == last, 0, 0)
                for index, (device, (first, end)) in enumerate(
                    zip(self.devices, ranges, strict=True)
                )
            )
        )

    @property
    def stages(self) -> list[dict[str, Any]]:
        """As a plan file has them."""
        return [
            {"device_id": s.device_id, "first_layer": s.first_layer, "last_layer": s.last_layer}
            for s in self.replica().stages
        ]


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a replica: prompts of so many tokens, answers, and sequences at once."""

    prompt: int
    tokens: int
    slots: int

    @property
    def length(self) -> int:
        """The context of a sequence, with some room."""
        return self.prompt + self.tokens + 32


class Planner:
    """Plans and predictions by what a mesh has found out.

    Args:
        discovered: of the mesh.
        model: directory of the checkpoint.
        load: that is asked.
        memory: bytes of devices without stages, by host.
    """

    def __init__(
        self, discovered: Discovered, model: Path, load: Load, memory: Mapping[str, int]
    ) -> None:
        self.load, self._memory = load, memory
        self.topology: Topology = replace(
            discovered.topology,
            devices=tuple(
                replace(device, memory_bytes=memory[device.host])
                for device in discovered.topology.devices
            ),
        )
        self._discovered, self._directory = discovered, model
        self._model = read_profile(model, "float32")
        self._added: dict[str, str] = {}

    def request(self, objective: Objective = "lr", **load: Any) -> PlanRequest:
        """What a solver is asked; ``load`` completes the workload."""
        workload = Workload(
            slots=self.load.slots,
            max_tokens=self.load.length,
            prompt_tokens=self.load.prompt,
            output_tokens=self.load.tokens,
            **load,
        )
        times: dict[str, LayerTimes] = dict(
            self._discovered.layer_times(str(self._directory), "float32", workload)
        )
        for new, like in self._added.items():
            times[new] = times[like]
        return PlanRequest(self.topology, self._model, workload, objective, layer_times=times)

    def predict(self, layout: Layout, slots: int = 0) -> tuple[PlannedReplica, PlannedReplica]:
        """A layout with a lone request; and full, with a batch under way for each stage.

        Args:
            layout: to be predicted.
            slots: that are granted; 0: all that are wanted.
        """
        depth = len(layout.devices)
        found = []
        loads: list[dict[str, Any]] = [
            {"batch": 1},
            {"batch": max((slots or self.load.slots) // depth, 1), "in_flight": depth},
        ]
        for load in loads:
            plan = rated(Plan((layout.replica(),), 0, 0, "", ""), self.request(**load))
            if plan is None:
                raise SystemExit(f"{layout.name}: a device of it is not there any more")
            found.append(plan.replicas[0])
        return found[0], found[1]

    async def anew(self, redis_url: str) -> "Planner":
        """The same by layers that are measured now, on workers that are idle."""
        discovered = await probed_anew(redis_url, self._discovered, self._directory, "float32")
        return Planner(discovered, self._directory, self.load, self._memory)

    def with_change(self, text: str) -> "Planner":
        """The same for a cluster that might be; ``add=ID@HOST`` and ``remove=HOST``."""
        change = parse_change(text)
        other = Planner(self._discovered, self._directory, self.load, self._memory)
        other.topology = changed(self.topology, change, {})
        new = other.topology.devices[len(other.topology.devices) - len(change.added) :]
        other._added = {
            device.id: kind for device, (kind, _) in zip(new, change.added, strict=True)
        }
        return other

    def placed(self, present: Layout) -> Layout:
        """Where the deployer would place for least latency what is somewhere now."""
        before = Plan((present.replica(),), self.load.slots, self.load.length, "lr", "")
        there = {device.id for device in self.topology.devices}
        wanted = replace(self.request("lr"), previous=before)
        if there >= set(present.devices):
            plan, _ = improvement(wanted, before)
        else:
            plan = ObjectivePlacer().place(wanted)
        return Layout.of("placed anew", plan.replicas[0])

    def layouts(self, most: int) -> list[Layout]:
        """What objectives choose, what they did not, and what nobody would."""
        lone = solve(self.request(batch=1))
        (chosen,) = lone.replicas
        found = [Layout.of("least latency", chosen)]
        for depth in range(2, len(self.topology.devices) + 1):
            load = {"batch": self.load.slots // depth, "in_flight": depth, "stages": depth}
            plan = solve(self.request("throughput", **load))
            found += [Layout.of(f"throughput of {depth}", copy) for copy in plan.replicas]
        layers, every = len(self._model.layers), [d.id for d in self.topology.devices]
        found.append(Layout("backwards", found[0].devices[::-1], found[0].layers[::-1]))
        slowest = sorted(every, key=self._pace, reverse=True)
        found.append(Layout("slow ones first", tuple(slowest), _even(layers, len(slowest))))
        found += [
            Layout(each.name, each.device_ids, each.num_layers)
            for each in sorted(lone.candidates, key=lambda each: each.name)
            if each.tokens_per_second
        ]
        return _different(found)[:most]

    def _pace(self, device: str) -> float:
        decode = self.request(batch=1).layer_times[device].decode
        return decode[0][1]

    def moved(self, before: Layout, after: Layout) -> int:
        """Layers that devices hold after, and did not before."""

        def held(layout: Layout) -> set[tuple[str, int]]:
            return {
                (s.device_id, n)
                for s in layout.replica().stages
                for n in range(s.first_layer, s.last_layer + 1)
            }

        return len(held(after) - held(before))


def _even(layers: int, parts: int) -> tuple[int, ...]:
    return tuple(layers // parts + (part < layers % parts) for part in range(parts))


def _different(layouts: Sequence[Layout]) -> list[Layout]:
    """Each placement once, under its first name."""
    found: dict[tuple[tuple[str, ...], tuple[int, ...]], Layout] = {}
    for layout in layouts:
        found.setdefault((layout.devices, layout.layers), layout)
    return list(found.values())
