"""A mesh over such hosts: ``uellm up`` on the first, ``uellm join`` on the others."""

import asyncio
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.hosts import OUTSIDE, Host, Quota, apart, network, quota
from uellm.embedded import redis_url
from uellm.mesh.joining import Token
from uellm.mesh.tether import tethered
from uellm.placement.topology import LinkSpeed

UELLM = (str(Path(sys.executable).parent / "uellm"),)
GATEWAY_PORT = 50051
START_SECONDS, STOP_SECONDS = 240.0, 20.0
_INVITATION = re.compile(r"uellm join \S+ --token (\S+)")
_WORKER = "uellm_worker"
_ENGINE = "uellm_worker.engine"


@dataclass(frozen=True, slots=True)
class HostSpec:
    """A host as it is to be.

    Attributes:
        name: short, of letters.
        cores: that its workers compute with, a share of one.
        memory_bytes: that its worker offers.
    """

    name: str
    cores: float
    memory_bytes: int


class Member:
    """A host and what of the mesh runs on it.

    Attributes:
        spec: as it is to be.
        host: as it is.
        quota: of its workers.
    """

    def __init__(self, spec: HostSpec, host: Host, share: Quota) -> None:
        self.spec, self.host, self.quota = spec, host, share
        self._process: asyncio.subprocess.Process | None = None

    @property
    def running(self) -> bool:
        """Whether its part of the mesh runs."""
        return self._process is not None and self._process.returncode is None

    async def start(
        self, command: Sequence[str], environment: dict[str, str], until: re.Pattern[str], log: Path
    ) -> re.Match[str]:
        """Start a command there, wait for a line of its standard error, then hold its workers.

        Raises:
            SystemExit: if it ends, or takes too long.
        """
        self.quota.set(0)  # Loading libraries is no part of what is measured.
        settings = {
            "UELLM_WORKER_THREADS": "1",
            "UELLM_WORKER_MEMORY_BYTES": str(self.spec.memory_bytes),
            "UELLM_HOME": str(log.parent / self.spec.name),
        }
        with log.open("ab") as kept:
            self._process = await asyncio.create_subprocess_exec(
                *tethered(self.host.command(*command)),
                env=environment | settings,
                stdout=kept,
                stderr=kept,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while (found := until.search(_read(log))) is None:
            if self._process.returncode is not None or time.monotonic() > deadline:
                raise SystemExit(f"{' '.join(command[:4])} on {self.spec.name}: see {log}")
            await asyncio.sleep(0.1)
        self.quota.hold(self._workers())
        self.quota.set(self.spec.cores)
        return found

    def _workers(self) -> list[int]:
        """The workers and all that they have started."""
        if self._process is None:
            return []
        found: list[int] = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if process.pid not in found and _WORKER in process.cmdline():
                    below = process.children(recursive=True)
                    found += [process.pid, *(each.pid for each in below)]
        return found

    def used_seconds(self) -> dict[str, float]:
        """Processor time of its workers so far: of agents, and of the engines that compute.

        And what their quota held them back.
        """
        found = {"agent": 0.0, "engine": 0.0, "held": self.quota.held_seconds()}
        for pid in (self.quota.group / "cgroup.procs").read_text().split():
            with suppress(psutil.Error):
                process = psutil.Process(int(pid))
                kind = "engine" if _ENGINE in " ".join(process.cmdline()) else "agent"
                used = process.cpu_times()
                found[kind] += used.user + used.system
        return found

    async def stop(self) -> None:
        """Have its part leave in order; what does not in time is killed."""
        self.quota.set(0)
        if self._process is None or self._process.returncode is not None:
            return
        self._process.send_signal(signal.SIGINT)
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await self._process.wait()
                return
        await self.kill()

    async def kill(self) -> None:
        """Kill its part of the mesh, all at once."""
        if self._process is None or self._process.returncode is not None:
            return
        tree = psutil.Process(self._process.pid).children(recursive=True)
        for process in tree:
            with suppress(psutil.Error):
                process.kill()
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        psutil.wait_procs(tree, timeout=STOP_SECONDS)


class ShapedMesh:
    """A mesh that runs over hosts.

    Attributes:
        members: by name, whether or not they have joined.
        directory: of logs.
        way: how fast the wire from a host to another is.
    """

    def __init__(
        self,
        members: dict[str, Member],
        directory: Path,
        environment: dict[str, str],
        way: Callable[[str, str], LinkSpeed],
    ) -> None:
        self.members, self.directory, self.way = members, directory, way
        self._environment = environment
        self._head = next(iter(members.values()))
        self._token = ""

    @property
    def address(self) -> str:
        """The gateway's."""
        return f"{self._head.host.address}:{GATEWAY_PORT}"

    @property
    def redis_url(self) -> str:
        """The mesh's Redis."""
        token = Token.parse(self._token)
        return redis_url(self._head.host.address, token.port, token.secret)

    async def up(self) -> None:
        """Start it on the first host."""
        said = await self._head.start(
            [*UELLM, "up", "--listen", self._head.host.address, "--port", str(GATEWAY_PORT)],
            self._environment,
            re.compile(r"join: uellm join \S+ --token (\S+)"),
            self.directory / "up.log",
        )
        self._token = said[1]

    async def join(self, name: str) -> None:
        """Have a host join."""
        member = self.members[name]
        await member.start(
            [*UELLM, "join", self._head.host.address, "--token", self._token],
            self._environment,
            re.compile(r"logs \S+"),
            self.directory / f"join-{name}-{time.monotonic():.0f}.log",
        )

    async def run(self, *arguments: str, check: bool = True) -> str:
        """What a command of ``uellm`` prints.

        Raises:
            SystemExit: if it fails and is not to.
        """
        process = await asyncio.create_subprocess_exec(
            *UELLM,
            *arguments,
            env=self._environment | {"UELLM_REDIS_URL": self.redis_url, "COLUMNS": "200"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        if check and process.returncode:
            raise SystemExit(f"uellm {' '.join(arguments)}: {out.decode()}{err.decode()}")
        return out.decode()

    async def json(self, *arguments: str) -> Any:
        """What a command prints as JSON."""
        return json.loads(await self.run(*arguments, "--json"))


@asynccontextmanager
async def shaped_mesh(
    specs: Sequence[HostSpec],
    ways: Mapping[str, LinkSpeed],
    joined: Sequence[str],
) -> AsyncIterator[ShapedMesh]:
    """A mesh over hosts; some of them have joined.

    Args:
        specs: the hosts; the first has the services, and a worker.
        ways: to and from each of the hosts: of two, the slower one counts.
        joined: names of hosts to join at once.

    Raises:
        NoHostsError: if there can be no such hosts here.
    """

    def between(one: str, other: str) -> LinkSpeed:
        ends = [ways[name] for name in (one, other) if name != OUTSIDE]
        return LinkSpeed(
            max(end.latency_seconds for end in ends), min(end.bytes_per_second for end in ends)
        )

    environment = {k: v for k, v in os.environ.items() if not k.startswith("UELLM_")}
    environment |= {
        "UELLM_DEPLOYER_PROBE_SECONDS": "120",
        "UELLM_DEPLOYER_REPLAN_COOLDOWN_SECONDS": "5",
        "UELLM_WORKER_STEP_POLICY": "fcfs",
        "UELLM_SCHEDULER_POLICY": "fcfs",
    }
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="uellm-shaped-")))
        stack.enter_context(apart())
        hosts = stack.enter_context(network([spec.name for spec in specs], between))
        members = {
            spec.name: Member(spec, hosts[spec.name], stack.enter_context(quota(spec.name)))
            for spec in specs
        }
        for member in members.values():
            stack.push_async_callback(member.kill)
        mesh = ShapedMesh(members, directory, environment, between)
        try:
            await mesh.up()
            await asyncio.gather(*(mesh.join(name) for name in joined))
            yield mesh
        finally:
            # The first has what the others leave in order.
            for member in reversed(members.values()):
                member.quota.set(0)
            await asyncio.gather(*(m.stop() for m in list(members.values())[1:]))
            await next(iter(members.values())).stop()


def _read(log: Path) -> str:
    return log.read_text()
