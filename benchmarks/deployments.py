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

The machine needs some cores that are free: shares are of its own. Predictions rest on the way from
stage to stage alone; those "with the way back" add that of each step's tokens to the first stage.
"""

import argparse
import asyncio
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

from benchmarks.hosts import NoHostsError
from benchmarks.layouts import Layout, Planner
from benchmarks.scores import kendall, median_error, regret, spearman
from benchmarks.shaped_client import LOAD, MODEL, Client, write_model
from benchmarks.shaped_mesh import HostSpec, ShapedMesh, shaped_mesh
from uellm.cli.discovered import discover
from uellm.placement.topology import LinkSpeed

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
_STATUS_CALLS = 3


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

    async def run(self, plans: int, *, changes: bool) -> dict[str, Any]:
        """What came of it."""
        await self._mesh.run("undeploy", "demo")
        # Before its first placement the model's layers are measured, and the ways.
        await self._deploy("--objective", "lr")
        await self._mesh.run("undeploy", MODEL)
        planner = await self._planner()
        found: dict[str, Any] = {"found": self._discovered(planner), "plans": []}
        _show_found(found["found"])
        for layout in planner.layouts(plans):
            found["plans"].append(await self._compare(planner, layout))
            _show_plan(found["plans"][-1])
        if plans:
            # One that lost a host for a while was elsewhere meanwhile.
            found["scores"] = scores([plan for plan in found["plans"] if plan["kept"]])
            _say(json.dumps(found["scores"], indent=1))
        if changes:
            found["what_if"] = await self._changes(planner)
            _say(json.dumps(found["what_if"], indent=1))
        return found

    async def _planner(self) -> Planner:
        memory = {spec.name: spec.memory_bytes for spec in HOSTS}
        return Planner(await discover(self._mesh.redis_url), self._model, LOAD, memory)

    def _discovered(self, planner: Planner) -> dict[str, Any]:
        """What was found of devices and ways, beside how they were made."""
        times = planner.request(batch=1).layer_times
        by_host = {device.host: device.id for device in planner.topology.devices}
        devices = [
            {
                "host": spec.name,
                "cores": spec.cores,
                "layer_ms": 1e3 * times[by_host[spec.name]].decode[0][1],
            }
            for spec in HOSTS
            if spec.name in by_host
        ]
        host = {device: name for name, device in by_host.items()}
        ways = [
            {
                "from": host[link.src],
                "to": host[link.dst],
                "made_ms": 1e3 * made.latency_seconds,
                "found_ms": 1e3 * link.latency_seconds,
                "made_mb": made.bytes_per_second / 1e6,
                "found_mb": link.bytes_per_second / 1e6,
            }
            for link in planner.topology.links
            for made in (self._mesh.way(host[link.src], host[link.dst]),)
        ]
        return {"devices": devices, "ways": ways}

    async def _deploy(self, *how: str) -> None:
        await self._mesh.run(
            *("deploy", f"{MODEL}={self._model}", "--slots", str(LOAD.slots)),
            *("--max-model-len", str(LOAD.length), "--prompt-tokens", str(LOAD.prompt)),
            *("--output-tokens", str(LOAD.tokens), *how),
        )

    async def _compare(self, planner: Planner, layout: Layout) -> dict[str, Any]:
        """A placement's predictions, and what it does."""
        file = self._mesh.directory / "plan.json"
        file.write_text(json.dumps({"stages": layout.stages}))
        await self._deploy("--plan", str(file))
        (deployment,) = (await self._mesh.json("status", MODEL))["deployments"]
        lone, full = planner.predict(layout, deployment["slots"])
        if lone.prediction is None or full.prediction is None:
            raise AssertionError("unreachable: it was rated")
        alone = await self._client.alone(self._repeats)
        stages = {"alone": await self._stages(lone)}
        rates = await self._client.full(self._repeats)
        stages["full"] = await self._stages(full)
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
            "predicted_seconds": lone.prediction.total_seconds,
            "predicted_with_way_back": lone.prediction.total_seconds
            + LOAD.tokens * planner.way_back(layout),
            "measured_seconds": median(took for _, took in alone),
            "measured_first": median(first for first, _ in alone),
            "predicted_tokens_per_second": full.prediction.tokens_per_second,
            "measured_tokens_per_second": median(rates),
            "runs": {"seconds": [took for _, took in alone], "tokens_per_second": rates},
            "stages": stages,
        }

    async def _stages(self, planned: Any) -> list[dict[str, Any]]:
        """What stages were to take of a step, and took in the latest."""
        samples = []
        for _ in range(_STATUS_CALLS):
            (deployment,) = (await self._mesh.json("status", MODEL))["deployments"]
            samples += [live["stages"] for live in deployment["live"] if live["stages"]]
        return [
            {
                "device": stage.device_id,
                "planned_ms": 1e3 * stage.decode_seconds,
                "measured_ms": 1e3 * median(sample[i]["measured_seconds"] for sample in samples),
                "predicted_ms": 1e3 * median(sample[i]["predicted_seconds"] for sample in samples),
            }
            for i, stage in enumerate(planned.stages)
            if samples and len(samples[0]) == len(planned.stages)
        ]

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
        return median(took for _, took in await self._client.alone(self._repeats))

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


def scores(plans: list[dict[str, Any]]) -> dict[str, Any]:
    """How well predictions order plans, and how far off they are."""

    def of(name: str) -> list[float]:
        return [plan[name] for plan in plans]

    measured = of("measured_seconds")
    slowness = [1 / rate for rate in of("measured_tokens_per_second")]
    predicted = {
        "latency": (of("predicted_seconds"), measured),
        "latency with the way back": (of("predicted_with_way_back"), measured),
        "throughput": ([1 / rate for rate in of("predicted_tokens_per_second")], slowness),
    }
    found: dict[str, Any] = {
        name: {
            "spearman": round(spearman(*pair), 3),
            "kendall": round(kendall(*pair), 3),
            "regret": round(regret(*pair), 3),
            "median_error": round(median_error(*pair), 3),
        }
        for name, pair in predicted.items()
    }
    for kind in ("alone", "full"):
        stages = [stage for plan in plans for stage in plan["stages"][kind]]
        pairs = [(s["planned_ms"], s["measured_ms"]) for s in stages if s["measured_ms"]]
        if pairs:
            errors = [abs(p / m - 1) for p, m in pairs]
            found[f"stages {kind}"] = {
                "median_error": round(median(errors), 3),
                "within_15_percent": round(sum(e <= 0.15 for e in errors) / len(errors), 2),
                "stages": len(errors),
            }
    return found


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _show_found(found: dict[str, Any]) -> None:
    for device in found["devices"]:
        _say(f"{device['host']:6} {device['cores']:4} cores: {device['layer_ms']:.2f} ms a layer")
    for way in found["ways"]:
        _say(
            f"{way['from']:>6} -> {way['to']:6} {way['made_ms']:6.2f} ms made, "
            f"{way['found_ms']:6.2f} found; {way['made_mb']:6.1f} MB/s made, "
            f"{way['found_mb']:6.1f} found"
        )


def _show_plan(plan: dict[str, Any]) -> None:
    where = " ".join(f"{device.split('-')[1]}:{count}" for device, count in plan["layers"])
    _say(
        f"{plan['name']:20} {where:32} latency {plan['predicted_seconds']:.3f} predicted, "
        f"{plan['predicted_with_way_back']:.3f} with the way back, "
        f"{plan['measured_seconds']:.3f} measured; tokens/s "
        f"{plan['predicted_tokens_per_second']:.0f}, {plan['measured_tokens_per_second']:.0f}"
        + ("" if plan["kept"] else "; lost a host meanwhile, does not count")
    )
    for kind, stages in plan["stages"].items():
        for stage in stages:
            _say(
                f"    {kind:6} {stage['device'].split('-')[1]:6} {stage['planned_ms']:6.2f} ms "
                f"planned, {stage['measured_ms']:6.2f} measured"
            )


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
    parser = argparse.ArgumentParser(prog="benchmarks.deployments", description=__doc__)
    parser.add_argument("--plans", type=int, default=12, help="placements at most")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement")
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
