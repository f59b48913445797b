"""`uellm profiler versions` and `rollback`, behind their options."""

import asyncio
import json
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from uellm import convert
from uellm.cli import exits
from uellm.cli.service_calls import service
from uellm.core.errors import UnavailableError
from uellm.rpc import CALL_SECONDS
from uellm.v1 import profiler_pb2
from uellm.v1.profiler_pb2_grpc import ProfilerServiceStub

TAKEN_UP_SECONDS = 15.0
_POLL_SECONDS = 0.1


async def show(redis_url: str, *, as_json: bool) -> int:
    """The versions that are kept."""
    async with service(redis_url, "profiler") as connection:
        versions = await _versions(ProfilerServiceStub(connection))
    if as_json:
        sys.stdout.write(json.dumps([_facts(version) for version in versions], indent=2) + "\n")
        return exits.OK
    columns = ("version", "predictor", "serves since", "loss", "before it", "answers", "why")
    table = Table(*columns, box=None)
    for version in versions:
        challenged = version.outcomes > 0
        table.add_row(
            str(version.number),
            f"{version.predictor} {version.predictor_version}",
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(convert.seconds(version.served_at))),
            f"{version.loss:.3f}" if challenged else "-",
            f"{version.loss_before:.3f}" if challenged else "-",
            str(version.outcomes) if challenged else "-",
            version.reason,
        )
    Console().print(table if versions else "nothing has been learnt yet")
    return exits.OK


async def roll_back(redis_url: str, number: int) -> int:
    """Let an earlier version serve; wait until it does."""
    async with service(redis_url, "profiler") as connection:
        stub: Any = ProfilerServiceStub(connection)
        before = await _versions(stub)
        request = profiler_pb2.RollbackRequest(number=number)
        await stub.Rollback(request, timeout=CALL_SECONDS)
        deadline = time.monotonic() + TAKEN_UP_SECONDS
        while (latest := (await _versions(stub))[-1]).number <= before[-1].number:
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"no profiler has taken it up within {TAKEN_UP_SECONDS:.0f} s; it will be when "
                    "one learns again (its log says why none does)"
                )
            await asyncio.sleep(_POLL_SECONDS)
    sys.stdout.write(f"version {latest.number} serves: {latest.reason}\n")
    return exits.OK


async def _versions(stub: Any) -> list[profiler_pb2.PredictorVersion]:
    response = await stub.ListVersions(profiler_pb2.ListVersionsRequest(), timeout=CALL_SECONDS)
    return list(response.versions)


def _facts(version: profiler_pb2.PredictorVersion) -> dict[str, Any]:
    challenged = version.outcomes > 0
    return {
        "number": version.number,
        "predictor": version.predictor,
        "predictor_version": version.predictor_version,
        "served_at": convert.seconds(version.served_at),
        "reason": version.reason,
        "outcomes": version.outcomes,
        "loss": version.loss if challenged else None,
        "loss_before": version.loss_before if challenged else None,
    }
