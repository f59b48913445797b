"""Placements on hosts that differ, predicted and measured: what plans are worth.

Usage: ``python -m benchmarks.deployments [--plans N] [--repeats N] [--json]``; Linux, as root.

Hosts are network namespaces on one machine (``benchmarks.hosts``), with wires of known speed
between them and shares of a core; the mesh over them is the real one, ``uellm up`` on the first and
``uellm join`` on the others. Then

1. what the mesh finds out about devices and ways is compared with how they were made;
2. plans are deployed one after another with ``uellm deploy --plan``: what objectives choose, what
   they did not, and what nobody would. Of each, the latency of lone requests and the tokens per
   second of many are measured, medians of several runs, beside what was predicted;
3. another host joins, which was asked about before: does the mesh use it, and does it bring what
   ``--what-if add=…`` said?
4. that host is killed while requests run: is every answer whole, and does the mesh go on where
   ``--what-if remove=…`` said, moving as many layers?

The machine needs some cores that are free: shares are of its own. Cold predictions rest on what was
measured before anything was placed; learnt ones, made before each placement, besides on the steps
of those before it; those made anew, on layers measured once more right before each placement.
What these err by is the prediction's; what cold ones err by besides is how the machine was then.
"""

import argparse
import asyncio
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from statistics import mean, median
from types import FrameType
from typing import Any, TypeVar

from benchmarks.arguments import count, count_or_none, parser_of
from benchmarks.deployments_shown import found_beside_made, say, show_found, show_plan
from benchmarks.hosts import NoHostsError
from benchmarks.layouts import Layout, Planner
from benchmarks.machine import per_token, reference_seconds, spread
from benchmarks.probed_anew import until_measured
from benchmarks.scores import scores
from benchmarks.shaped_client import LOAD, MODEL, Client, write_model
from benchmarks.shaped_mesh import HostSpec, ShapedMesh, shaped_mesh
from uellm.cli.discovered import discover
from uellm.placement.topology import LinkSpeed
from uellm.placement.views import PlannedReplica, Prediction

T = TypeVar("T")

MIB = 1 << 20
HOSTS = (
    HostSpec("fast", 1.0, 450 * MIB),
    HostSpec("half", 0.5, 450 * MIB),
    HostSpec("slow", 0.25, 450 * MIB),
    HostSpec("far", 1.0, 450 * MIB),
    HostSpec("late", 1.0, 450 * MIB),
)
"""None has room for the whole model."""
LATE, LIKE = "late", "fast"
WAYS = {
    "fast": LinkSpeed(0.0002, 1e8),
    "half": LinkSpeed(0.0002, 1e8),
    "slow": LinkSpeed(0.001, 2e7),
    "far": LinkSpeed(0.01, 5e6),
    "late": LinkSpeed(0.0002, 1e8),
}
_WAIT_SECONDS = 120.0
_SEEN_SECONDS = 4.0
"""By when the deployer has seen the steps of a request."""


class Experiment:
    """All of it, on a mesh that is up.

    Args:
        mesh: over the hosts.
        model: directory of the checkpoint.
        repeats: of each measurement.
    """

    def __init__(self, mesh: ShapedMesh, model: Path, repeats: int) -> None:
        self._mesh, self._model, self._repeats = mesh, model, repeats
        self._client = Client(mesh)
        self._as_probed = 1.0

    async def run(self, plans: int, *, changes: bool) -> dict[str, Any]:
        """What came of it."""
        await self._mesh.run("undeploy", "demo")
        # Before its first placement the model's layers are measured, and the ways.
        await self._deploy("--objective", "lr")
        await self._mesh.run("undeploy", MODEL)
        await until_measured(self._mesh.redis_url, _WAIT_SECONDS)
        planner = await self._planner()
        self._as_probed = await asyncio.to_thread(reference_seconds)
        found: dict[str, Any] = {
            "found": found_beside_made(planner, HOSTS, self._mesh.way),
            "plans": [],
        }
        show_found(found["found"])
        layouts = planner.layouts(plans)
        # The first once more at the end: how far the same is from itself no prediction can mend.
        for layout in [*layouts, *layouts[:1]]:
            found["plans"].append(await self._compare(planner, layout))
            show_plan(found["plans"][-1])
        if plans:
            found["again"] = found["plans"].pop()
            # One that lost a host for a while was elsewhere meanwhile.
            kept = [plan for plan in found["plans"] if plan["kept"]]
            found["scores"] = scores(kept, found["again"])
            say(json.dumps(found["scores"], indent=1))
        if changes:
            found["what_if"] = await self._changes(planner)
            say(json.dumps(found["what_if"], indent=1))
        return found

    async def _planner(self) -> Planner:
        memory = {spec.name: spec.memory_bytes for spec in HOSTS}
        discovered = await discover(self._mesh.redis_url, str(self._model))
        return Planner(discovered, self._model, LOAD, memory)

    async def _deploy(self, *how: str) -> None:
        await self._mesh.run(
            *("deploy", f"{MODEL}={self._model}", "--slots", str(LOAD.slots)),
            *("--max-model-len", str(LOAD.length), "--prompt-tokens", str(LOAD.prompt)),
            *("--output-tokens", str(LOAD.tokens), *how),
        )

    async def _compare(self, planner: Planner, layout: Layout) -> dict[str, Any]:
        """A placement's predictions, and what it does.

        By what was measured before anything was placed, by what was learnt of those before it
        besides, and by layers that are measured anew right before.
        """
        learnt = await self._planner()
        anew = await planner.anew(self._mesh.redis_url)
        file = self._mesh.directory / "plan.json"
        file.write_text(json.dumps({"stages": layout.stages}))
        await self._deploy("--plan", str(file))
        (deployment,) = (await self._mesh.json("status", MODEL))["deployments"]
        told = {
            "cold": planner.predict(layout, deployment["slots"]),
            "learnt": learnt.predict(layout, deployment["slots"]),
            "anew": anew.predict(layout, deployment["slots"]),
        }
        paces = [await asyncio.to_thread(reference_seconds)]
        begun = self._used()
        alone, lone_steps = await self._repeated(self._client.alone)
        between = self._used()
        paces.append(await asyncio.to_thread(reference_seconds))
        rates, full_steps = await self._repeated(self._client.full)
        tokens = (self._repeats + 1) * LOAD.tokens
        used = {
            "alone": per_token(begun, between, tokens),
            "full": per_token(between, self._used(), 2 * LOAD.slots * tokens),
        }
        stages = {
            "alone": _stages({how: lone for how, (lone, _) in told.items()}, lone_steps),
            "full": _stages({how: full for how, (_, full) in told.items()}, full_steps),
        }
        held = await self._held()
        await self._mesh.run("undeploy", MODEL)
        return {
            "name": layout.name,
            "slots": deployment["slots"],
            "kept": held is not None
            and (held.devices, held.layers) == (layout.devices, layout.layers),
            "layers": [
                (device, n) for device, n in zip(layout.devices, layout.layers, strict=True)
            ],
            "predicted_seconds": {how: _of(lone).total_seconds for how, (lone, _) in told.items()},
            "measured_seconds": median(took for _, took in alone),
            "measured_first": median(first for first, _ in alone),
            "predicted_tokens_per_second": {
                how: _of(full).tokens_per_second for how, (_, full) in told.items()
            },
            "measured_tokens_per_second": median(rates),
            "runs": {"seconds": [took for _, took in alone], "tokens_per_second": rates},
            "stages": stages,
            "used_ms_per_token": used,
            "machine": mean(paces) / self._as_probed,
        }

    def _used(self) -> dict[str, dict[str, float]]:
        """Processor time of hosts so far, by what took it."""
        return {n: m.used_seconds() for n, m in self._mesh.members.items() if m.running}

    async def _repeated(
        self, measure: Callable[[], Awaitable[T]]
    ) -> tuple[list[T], list[list[float]]]:
        """Measure several times; besides, what stages took each time, as the mesh has seen it."""
        await measure()  # To warm up.
        seen = await self._steps(0.0)
        found, steps = [], []
        for _ in range(self._repeats):
            found.append(await measure())
            before, (at, seconds) = seen[0], await self._steps(seen[0])
            seen = at, seconds
            if at > before:
                steps.append(seconds)
        return found, steps

    async def _steps(self, before: float) -> tuple[float, list[float]]:
        """When the latest steps that only decoded were, and seconds of their stages.

        Args:
            before: how long to wait for others than those of that time.
        """
        deadline = time.monotonic() + _SEEN_SECONDS
        while True:
            (deployment,) = (await self._mesh.json("status", MODEL))["deployments"]
            for live in deployment["live"]:
                at = max((_when(stage["seen_at"]) for stage in live["stages"]), default=0.0)
                if at > before:
                    return at, [stage["measured_seconds"] for stage in live["stages"]]
            if time.monotonic() > deadline:
                return before, []
            await asyncio.sleep(0.2)

    # ---- hosts that come and go ----------------------------------------------------------------

    async def _changes(self, planner: Planner) -> dict[str, Any]:
        """A host joins, and is killed; each time asked about before."""
        host = {device.host: device.id for device in planner.topology.devices}
        await self._deploy("--objective", "lr")
        before = await self._settled()
        seconds = {"before": await self._seconds()}
        wider = planner.with_change(f"add={host[LIKE]}@{LATE}")
        to_be = wider.placed(before)
        predicted = {
            "before": planner.predict(before)[0].prediction,
            "added": wider.predict(to_be)[0].prediction,
        }
        await self._mesh.join(LATE)
        used_after = await self._until_held(lambda held: any(LATE in d for d in held.devices))
        joined = await self._settled()
        seconds["added"] = await self._seconds()
        left = (await self._planner()).with_change(f"remove={LATE}")
        after_loss = left.placed(joined)
        predicted["removed"] = left.predict(after_loss)[0].prediction
        done = asyncio.Event()
        asking = asyncio.create_task(self._client.until(done))
        await asyncio.sleep(1.0)  # So that there are requests to lose.
        await self._mesh.members[LATE].kill()
        again_after = await self._until_held(lambda held: not any(LATE in d for d in held.devices))
        done.set()
        answered = await asking
        settled = await self._settled()
        seconds["removed"] = await self._seconds()
        return {
            "used_after_seconds": used_after,
            "serving_again_after_seconds": again_after,
            "answered_meanwhile": answered,
            "placed": {
                "before": before.stages,
                "added": joined.stages,
                "added_predicted": to_be.stages,
                "removed": settled.stages,
                "removed_predicted": after_loss.stages,
            },
            "moved_layers": {
                "predicted": planner.moved(joined, after_loss),
                "measured": planner.moved(joined, settled),
            },
            "predicted_seconds": {
                name: found.total_seconds for name, found in predicted.items() if found is not None
            },
            "measured_seconds": seconds,
        }

    async def _seconds(self) -> float:
        await self._client.alone()
        return median([(await self._client.alone())[1] for _ in range(self._repeats)])

    async def _held(self) -> Layout | None:
        """Where the replica that takes requests is."""
        (deployment,) = (await self._mesh.json("status", MODEL))["deployments"]
        for replica in deployment["replicas"]:
            if replica["state"] == "REPLICA_STATE_READY":
                stages = replica["planned"]["stages"]
                counts = [s["last_layer"] - s["first_layer"] + 1 for s in stages]
                return Layout("held", tuple(s["device_id"] for s in stages), tuple(counts))
        return None

    async def _settled(self) -> Layout:
        await self._until_held(lambda held: True)
        held = await self._held()
        if held is None:
            raise SystemExit("the replica went away")
        return held

    async def _until_held(self, as_wanted: Any) -> float:
        """How long it takes until the replica is somewhere.

        Raises:
            SystemExit: if it takes too long.
        """
        began = time.monotonic()
        while (held := await self._held()) is None or not as_wanted(held):
            if time.monotonic() - began > _WAIT_SECONDS:
                raise SystemExit(f"the replica is still on {held}")
            await asyncio.sleep(0.1)
        return time.monotonic() - began


def _of(replica: PlannedReplica) -> Prediction:
    if replica.prediction is None:
        raise AssertionError("unreachable: it was rated")
    return replica.prediction


def _when(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()


def _stages(told: dict[str, PlannedReplica], seen: list[list[float]]) -> list[dict[str, Any]]:
    """What stages were to take of a step that only decodes, and took; nothing if none was seen."""
    (first, *_) = told.values()
    return [
        {
            "device": stage.device_id,
            "planned_ms": {how: 1e3 * each.stages[i].decode_seconds for how, each in told.items()},
            "measured_ms": 1e3 * median(seconds[i] for seconds in seen),
            "spread": spread([seconds[i] for seconds in seen]),
        }
        for i, stage in enumerate(first.stages)
        if seen
    ]


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start the mesh, measure, stop it."""
    with tempfile.TemporaryDirectory(prefix="uellm-deployments-") as made:
        model = Path(made) / "model"
        write_model(model)
        joined = [spec.name for spec in HOSTS[1:] if spec.name != LATE]
        async with shaped_mesh(HOSTS, WAYS, joined) as mesh:
            experiment = Experiment(mesh, model, arguments.repeats)
            found = await experiment.run(arguments.plans, changes=arguments.changes)
            if arguments.logs:
                shutil.copytree(mesh.directory, arguments.logs, dirs_exist_ok=True)
            return found


def _end(number: int, frame: FrameType | None) -> None:
    """End as by Ctrl-C, so that nothing is left."""
    del number, frame
    signal.raise_signal(signal.SIGINT)


def main() -> None:
    """Measure and print."""
    parser = parser_of("deployments", __doc__)
    parser.add_argument("--plans", type=count_or_none, default=12, help="placements at most")
    parser.add_argument("--repeats", type=count, default=5, help="of each measurement")
    parser.add_argument(
        "--changes",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="have a host join and be killed",
    )
    parser.add_argument("--logs", type=Path, help="keep the mesh's logs there")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    # What a shell starts in the background ignores Ctrl-C otherwise.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _end)
    try:
        result = asyncio.run(run(arguments))
    except NoHostsError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if arguments.json:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
