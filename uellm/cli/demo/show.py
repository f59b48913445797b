"""The demo from beginning to end."""

import asyncio
import contextlib
import json
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console

from uellm.cli import exits
from uellm.cli.demo import screens
from uellm.cli.demo.burst import FILLER_TOKENS, MODEL, Row, run_burst, warm_up
from uellm.cli.demo.calibration import Calibration, calibrate
from uellm.cli.demo.spans import read_spans, summarise
from uellm.cli.tree import Progress
from uellm.client import Client
from uellm.demo.prompts import demo_prompts
from uellm.mesh.mesh import Mesh
from uellm.mesh.options import DEMO_MODEL, MeshOptions, ModelSource
from uellm.rpc import CALL_SECONDS, channel, error_from
from uellm.v1 import scheduler_pb2, scheduler_pb2_grpc

WORKERS = 2
SLOTS = 4
OURS, BASELINE = "cslo-odbs", "fcfs"
POLICIES = (OURS, BASELINE)
"""The first one is the table's, and stays in force."""
WIDTH = 118
POLL_SECONDS = 0.1


class Demo:
    """One run of the demo.

    Args:
        mesh: the mesh it runs on.
        console: what it prints to.
        progress: what it is waiting for.
    """

    def __init__(self, mesh: Mesh, console: Console, progress: Progress) -> None:
        self._mesh = mesh
        self._console = console
        self._progress = progress
        self.bursts: dict[str, list[Row]] = {}
        self.where: dict[str, str] = {}
        self.calibration: Calibration | None = None

    async def run(self) -> None:
        """Measure, ask under each policy, show."""
        prompts = demo_prompts()
        async with Client(self._mesh.address) as client:
            self._progress("warming up and measuring this machine")
            per_token = await warm_up(client, prompts)
            calibration = calibrate(prompts, SLOTS, per_token, FILLER_TOKENS)
            self.calibration = calibration
            for placed in await self._mesh.placements(MODEL):
                self.where[placed.replica] = " ".join(_abbreviated(s) for s in placed.stages)
            for policy in POLICIES:
                await self._set_policy(policy)
                self._progress.done()
                self._say(screens.explain_calibration(calibration, SLOTS), policy == OURS)
                self._say(f"{len(prompts)} prompts at once, {screens.POLICY_NAMES[policy]}:", True)
                streams = screens.Streams(self._console)
                try:
                    self.bursts[policy] = await run_burst(
                        client, prompts, calibration, SLOTS, streams.started, streams.changed
                    )
                finally:
                    streams.stop()
                self._show_table(policy)
            await self._set_policy(OURS)
        self._say(screens.comparison(self.measures()), True)

    @property
    def right(self) -> bool:
        """Whether every checkable answer was right, under every policy."""
        return all(row.right for rows in self.bursts.values() for row in rows)

    def measures(self) -> dict[str, dict[str, float]]:
        """What each policy made of the burst."""
        return {policy: screens.measures(rows) for policy, rows in self.bursts.items()}

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        rows = self.bursts[OURS]
        calibration = self.calibration
        return {
            "right": self.right,
            "checkable": sum(row.prompt.checkable for row in rows),
            "rows": [row.as_dict() | {"layers": self._layers(row)} for row in rows],
            "policies": self.measures(),
            "bursts": {
                policy: [row.as_dict() for row in burst] for policy, burst in self.bursts.items()
            },
            "seconds_per_token": calibration.seconds_per_token if calibration else None,
            "deadline_scale": calibration.scale if calibration else None,
            "placements": self.where,
        }

    def _layers(self, row: Row) -> str:
        return self.where.get(row.finished.replica, "") if row.finished else ""

    def _say(self, what: Any, wanted: bool) -> None:
        if wanted:
            self._console.print(what)
            self._console.print()

    def _show_table(self, policy: str) -> None:
        rows = self.bursts[policy]
        self._say(screens.results(rows, self.where), policy == OURS)
        self._say(screens.summary(rows, promises=policy == OURS), True)

    async def _set_policy(self, policy: str) -> None:
        """Choose a policy, and wait until the engines decide by it."""
        async with channel(await self._mesh.address_of("scheduler")) as connection:
            stub: Any = scheduler_pb2_grpc.SchedulerServiceStub(connection)
            change = scheduler_pb2.SetPolicyRequest(model=MODEL, policy=policy)
            which = scheduler_pb2.GetPolicyRequest(model=MODEL)
            try:
                await stub.SetPolicy(change, timeout=CALL_SECONDS)
                while True:
                    found = await stub.GetPolicy(which, timeout=CALL_SECONDS)
                    if all(replica.policy == policy for replica in found.replicas):
                        return
                    await asyncio.sleep(POLL_SECONDS)
            except grpc.aio.AioRpcError as error:
                raise error_from(error) from None


def _called() -> str:
    """How this program can be called from here."""
    path = Path(sys.argv[0])
    if shutil.which(path.name) == str(path):
        return path.name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _abbreviated(stage: str) -> str:
    return re.sub(r"^worker-(\d+)(?=[:/])", r"w\1", stage)


async def show(*, once: bool, as_json: bool, trace: Path | None) -> int:
    """Run the demo.

    Args:
        once: end after the runs, even on a terminal.
        as_json: print the results as JSON, and nothing else, on standard output.
        trace: where every service writes its spans; with ``as_json`` they are written anyway, and
            one request's are part of the results.

    Returns:
        0 if every checkable answer was right, else 1.
    """
    started = time.monotonic()
    console = Console(stderr=as_json, highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    progress = Progress()
    options = MeshOptions(
        models=(ModelSource(MODEL, str(DEMO_MODEL)),),
        workers=WORKERS,
        stages=WORKERS,
        slots=SLOTS,
        traced=as_json or trace is not None,
    )
    mesh = Mesh(options, progress, trace)
    demo = Demo(mesh, console, progress)
    facts: dict[str, Any] = {}
    try:
        async with mesh.running():
            facts["start_seconds"] = round(time.monotonic() - started, 2)
            await mesh.while_alive(demo.run())
            facts["pids"] = mesh.pids()
            facts["run_seconds"] = round(time.monotonic() - started, 2)
            if not once and not as_json and console.is_terminal:
                worker, pid = sorted(mesh.pids().items())[-1]
                console.print(screens.next_steps(_called(), worker, pid), markup=False)
                # Ctrl-C is how this part ends.
                with contextlib.suppress(asyncio.CancelledError):
                    await mesh.watch()
            progress("draining")
    finally:
        progress.done()
    if as_json:
        traced = _whole_way(demo.bursts)
        facts["trace"] = summarise(traced.request_id, read_spans(mesh.trace_directory))
        sys.stdout.write(json.dumps(demo.as_dict() | facts, indent=1) + "\n")
    return exits.OK if demo.right else exits.FAILED


def _whole_way(bursts: Mapping[str, Sequence[Row]]) -> Row:
    """One from the middle of a burst: it waited, was dispatched with others, and streamed.

    One that a profiler answered for, if there is one: on a busy machine it is late for some.
    """
    rows = bursts[OURS]
    middle = rows[len(rows) // 2 :]
    candidates = [*middle, *rows, *(row for burst in bursts.values() for row in burst)]
    return next((row for row in candidates if row.profiled), middle[0])
