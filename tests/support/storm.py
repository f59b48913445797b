"""A storm of kill -9 over a fleet, under a steady stream of requests from real clients."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.fleet import Fleet
from uellm.client import Client, new_request
from uellm.core.errors import UellmError
from uellm.v1 import common_pb2
from uellm.v1.inference_pb2 import Finished

Reference = Mapping[str, tuple[list[int], str]]
Fault = Callable[[], Coroutine[Any, Any, None]]


@dataclass
class Weather:
    """What happened in a storm. Times are seconds.

    Attributes:
        kills: by what was killed.
        answered: requests that ended as they do in calm.
        wrong: what was not as in calm, in plain words.
        longest_gap: between two tokens of one answer.
        longest_first: from a submission to its first token.
        attempts: starts of one request, at most.
    """

    kills: Counter[str] = field(default_factory=Counter)
    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    longest_gap: float = 0.0
    longest_first: float = 0.0
    attempts: int = 0

    def __str__(self) -> str:
        return (
            f"{sum(self.kills.values())} kills {dict(sorted(self.kills.items()))}, "
            f"{self.answered} answered, {len(self.wrong)} wrong, longest gap between two tokens "
            f"{self.longest_gap:.1f} s, longest wait for a first one {self.longest_first:.1f} s, "
            f"at most {self.attempts} attempts"
        )


class Storm:
    """Kills parts of a fleet one after the other while clients ask.

    Args:
        fleet: two of everything that can be two.
        model: the model that is asked.
        reference: the answers in calm, by prompt.
        rng: decides on everything.
        max_tokens: of every request.
        patience_seconds: how long a client waits for a gateway, and for a word of one.
    """

    def __init__(
        self,
        fleet: Fleet,
        model: str,
        reference: Reference,
        rng: random.Random,
        *,
        max_tokens: int,
        patience_seconds: float = 60.0,
    ) -> None:
        self.weather = Weather()
        self._fleet = fleet
        self._model = model
        self._reference = reference
        self._rng = rng
        self._max_tokens = max_tokens
        self._patience_seconds = patience_seconds
        self._over = asyncio.Event()

    async def rage(
        self, *, seconds: float, askers: int, every_seconds: float, redis_at: float
    ) -> None:
        """Ask and kill for so long; return when every request that was begun has ended.

        Args:
            seconds: how long requests are begun and parts are killed.
            askers: requests at a time.
            every_seconds: between two kills.
            redis_at: share of the time after which Redis is killed, once.
        """
        gateways = await self._fleet.addresses("gateway", 2)
        async with (
            Client(
                gateways,
                connect_seconds=self._patience_seconds,
                patience_seconds=self._patience_seconds,
            ) as client,
            asyncio.TaskGroup() as tasks,
        ):
            for _ in range(askers):
                tasks.create_task(self._ask_on(client))
            await self._strike(seconds, every_seconds, redis_at)
            self._over.set()

    # ---- asking --------------------------------------------------------------------------------

    async def _ask_on(self, client: Client) -> None:
        while not self._over.is_set():
            await self._ask(client, self._rng.choice(list(self._reference)))

    async def _ask(self, client: Client, prompt: str) -> None:
        ids: list[int] = []
        text, request_id = "", ""
        finished: Finished | None = None
        heard_at = time.monotonic()
        try:
            async for event in client.generate(
                new_request(self._model, prompt, max_tokens=self._max_tokens)
            ):
                request_id = event.request_id
                kind = event.WhichOneof("event")
                if finished is not None:
                    self._wrong(request_id, f"{kind} after its end")
                if kind == "tokens":
                    if event.tokens.offset != len(ids):
                        self._wrong(request_id, f"{event.tokens.offset} comes after {len(ids)}")
                    heard_at = self._heard(heard_at, first=not ids)
                    ids += event.tokens.ids
                    text += event.tokens.text
                elif kind == "finished":
                    finished = event.finished
        except UellmError as error:
            self._wrong(request_id, f"{type(error).__name__}: {error.message}")
            return
        self._judge(request_id, prompt, finished, (ids, text))

    def _heard(self, before: float, *, first: bool) -> float:
        now, weather = time.monotonic(), self.weather
        if first:
            weather.longest_first = max(weather.longest_first, now - before)
        else:
            weather.longest_gap = max(weather.longest_gap, now - before)
        return now

    def _judge(
        self,
        request_id: str,
        prompt: str,
        finished: Finished | None,
        answer: tuple[list[int], str],
    ) -> None:
        if finished is None:
            self._wrong(request_id, "no end")
            return
        self.weather.attempts = max(self.weather.attempts, finished.attempts)
        if finished.usage.output_tokens != len(answer[0]):
            self._wrong(request_id, f"{len(answer[0])} of {finished.usage.output_tokens} tokens")
        elif answer != self._reference[prompt]:
            reason = common_pb2.FinishReason.Name(finished.reason)
            self._wrong(request_id, f"another answer, {reason} {finished.failure.reason}")
        else:
            self.weather.answered += 1

    def _wrong(self, request_id: str, what: str) -> None:
        self.weather.wrong.append(f"{request_id}: {what}")

    # ---- killing -------------------------------------------------------------------------------

    async def _strike(self, seconds: float, every_seconds: float, redis_at: float) -> None:
        begun = time.monotonic()
        redis_due = True
        while (elapsed := time.monotonic() - begun) < seconds:
            if redis_due and elapsed >= redis_at * seconds:
                redis_due = False
                await self._kill_redis()
            else:
                name, fault = self._rng.choice(self._faults())
                with contextlib.suppress(LookupError, ProcessLookupError):
                    await fault()
                    self.weather.kills[name] += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(every_seconds * self._rng.uniform(0.5, 1.5)):
                    await self._over.wait()

    def _faults(self) -> list[tuple[str, Fault]]:
        services = sorted(self._fleet.services)
        faults: list[tuple[str, Fault]] = [
            (self._fleet.services[name].role, partial(self._kill_service, name))
            for name in services
        ]
        return faults + [("child", partial(self._kill_child, stage)) for stage in (0, 1)]

    async def _kill_service(self, name: str) -> None:
        service = self._fleet.services[name]
        service.kill()
        service.start()

    async def _kill_child(self, stage: int) -> None:
        """Kill the child that holds a stage.

        Raises:
            LookupError: if none is there at the moment.
        """
        pids = children_of([s.pid for s in self._fleet.services.values() if s.role == "worker"])
        if len(pids) <= stage:
            raise LookupError("no child")
        os.kill(pids[stage], signal.SIGKILL)

    async def _kill_redis(self) -> None:
        self._fleet.redis.kill()
        await asyncio.to_thread(self._fleet.redis.start)
        self.weather.kills["redis"] += 1


def children_of(pids: list[int]) -> list[int]:
    """Process ids of the grandchildren: what the fork servers of workers forked."""
    return [grandchild for pid in pids for child in _forked(pid) for grandchild in _forked(child)]


def _forked(pid: int) -> list[int]:
    found = []
    for task in _tasks(pid):
        # A kernel without CONFIG_PROC_CHILDREN has no such file.
        with contextlib.suppress(OSError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _tasks(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []
