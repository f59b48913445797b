"""Clients in processes of their own, that send whether or not they are answered.

One that falls behind would measure itself: requests are timed from when they were due, each process
says how late its own event loop was, and there are several of them.
"""

import asyncio
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

from uellm.cli.promises import ANSWERED
from uellm.client import Client, new_request
from uellm.core.errors import ResourceExhaustedError, UellmError
from uellm.v1 import common_pb2, inference_pb2

LAG_SECONDS = 0.01
"""How often a process looks at how late it is."""


@dataclass(frozen=True, slots=True)
class Asking:
    """What is asked, at random times.

    Attributes:
        model: of whom.
        rate: requests a second, on average.
        seconds: for so long.
        shortest: fewest output tokens.
        longest: most.
        seconds_per_token: the deadline, for each of them.
        seed: of times and lengths.
    """

    model: str
    rate: float
    seconds: float
    shortest: int
    longest: int
    seconds_per_token: float
    seed: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that ended.

    Attributes:
        reason: how; refused too if it was not accepted at all.
        due: when it was to be sent, in seconds since the first was.
        seconds: since it was due.
        in_time: answered, and as asked.
        retry: told when to try again.
        feasible: told the earliest finish that is feasible.
        door: refused by a gateway, before anything was done for it.
    """

    reason: common_pb2.FinishReason.ValueType
    due: float
    seconds: float
    in_time: bool = False
    retry: bool = False
    feasible: bool = False
    door: bool = False


@dataclass(frozen=True, slots=True)
class Told:
    """What became of a load.

    Attributes:
        ended: all requests.
        lags: seconds by which the clients' event loops were late.
    """

    ended: Sequence[Ended]
    lags: Sequence[float]


class Crowd:
    """Client processes.

    Args:
        pool: where they run.
        addresses: of the gateways; each process asks one of them.
        processes: how many.
    """

    def __init__(self, pool: ProcessPoolExecutor, addresses: Sequence[str], processes: int) -> None:
        self._pool = pool
        self._addresses = addresses
        self._processes = processes

    async def ask(self, asking: Asking) -> Told:
        """Ask, and wait for all ends."""
        loop, count = asyncio.get_running_loop(), self._processes
        parts = [
            loop.run_in_executor(
                self._pool, _ask, self._addresses[i % len(self._addresses)], asking, i, count
            )
            for i in range(count)
        ]
        told = await asyncio.gather(*parts)
        return Told(
            [one for part in told for one in part.ended],
            [lag for part in told for lag in part.lags],
        )


@contextmanager
def crowd(addresses: Sequence[str], processes: int) -> Iterator[Crowd]:
    """Client processes, for a while."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield Crowd(pool, addresses, processes)


def _ask(address: str, asking: Asking, number: int, processes: int) -> Told:
    return asyncio.run(_drive(address, asking, number, processes))


async def _drive(address: str, asking: Asking, number: int, processes: int) -> Told:
    rng = Random(f"{asking.seed} {number}")
    lags: list[float] = []
    async with Client(address) as client, asyncio.TaskGroup() as group:
        # Connected before the first one is timed.
        await client.models()
        looking = group.create_task(_look(lags))
        began, due = time.perf_counter(), 0.0
        async with asyncio.TaskGroup() as requests:
            tasks = []
            while (due := due + rng.expovariate(asking.rate / processes)) < asking.seconds:
                await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
                tokens = rng.randint(asking.shortest, asking.longest)
                tasks.append(requests.create_task(_one(client, asking, tokens, began, due)))
        looking.cancel()
    return Told([task.result() for task in tasks], lags)


async def _look(lags: list[float]) -> None:
    while True:
        began = time.perf_counter()
        await asyncio.sleep(LAG_SECONDS)
        lags.append(time.perf_counter() - began - LAG_SECONDS)


async def _one(client: Client, asking: Asking, tokens: int, began: float, due: float) -> Ended:
    request = new_request(
        asking.model,
        [("user", "Count from 1 to 20.")],
        max_tokens=tokens,
        deadline_seconds=tokens * asking.seconds_per_token,
        refuse=True,
    )
    request.sampling.ignore_eos = True
    finished = inference_pb2.Finished()

    def seconds() -> float:
        return time.perf_counter() - began - due

    try:
        async for event in client.generate(request):
            if event.WhichOneof("event") == "finished":
                finished = event.finished
    except ResourceExhaustedError as error:
        # Refused: at the door, because of what is ahead, or because too many wait already.
        return Ended(
            common_pb2.FINISH_REASON_REFUSED,
            due,
            seconds(),
            retry=error.retry_after_seconds is not None,
            feasible="earliest_feasible_finish" in error.metadata,
            door=error.reason == "OVERLOADED",
        )
    except UellmError:
        # Failed: it counts as let in, and as late.
        return Ended(finished.reason, due, seconds())
    in_time = finished.reason in ANSWERED and finished.slo.met
    return Ended(
        finished.reason,
        due,
        seconds(),
        in_time=in_time,
        retry=finished.failure.HasField("retry_after"),
    )
