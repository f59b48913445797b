"""Many prompts at once, through the public API, and what became of each."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import median
from typing import Any

from uellm import convert
from uellm.cli.demo.calibration import Calibration
from uellm.cli.promises import ANSWERED, REASONS
from uellm.client import Client, new_request
from uellm.demo.prompts import DemoPrompt
from uellm.demo.tasks import check, generate_task
from uellm.v1 import common_pb2, inference_pb2

MODEL = "demo"
FILLER = "Count from 1 to 20."
FILLER_TOKENS = 60
"""Its answer is no longer."""
WARM_UP_SEED = 4
MEASURED_TOKENS = 20
"""Shorter answers say little about the time per token."""


@dataclass(slots=True)
class Row:
    """A prompt of the burst, while it runs and afterwards. Times are seconds from acceptance."""

    prompt: DemoPrompt
    deadline_seconds: float
    request_id: str = ""
    text: str = ""
    tokens: int = 0
    accepted_at: float = 0.0
    profiled: bool = False
    first_promise: common_pb2.Promise | None = None
    finished: inference_pb2.Finished | None = None
    events: int = field(default=0, repr=False)

    def take(self, event: inference_pb2.GenerationEvent) -> None:
        """Note an event of the request."""
        self.request_id = event.request_id
        self.events += 1
        match event.WhichOneof("event"):
            case "accepted":
                self.accepted_at = convert.seconds(event.accepted.accepted_at)
                self.profiled = not event.accepted.profile.fallback
            case "promise":
                self.first_promise = self.first_promise or event.promise
            case "tokens":
                self.text += event.tokens.text
                self.tokens += len(event.tokens.ids)
            case "finished":
                self.finished = event.finished

    @property
    def right(self) -> bool:
        """Whether it was answered, and rightly as far as that can be checked."""
        if self.finished is None or self.finished.reason not in ANSWERED:
            return False
        return not self.prompt.checkable or check(self.prompt.prompt, self.text)

    @property
    def finish_seconds(self) -> float | None:
        """When it ended."""
        if self.finished is None:
            return None
        return convert.seconds(self.finished.timings.finished_at) - self.accepted_at

    @property
    def late_seconds(self) -> float:
        """How much after its deadline it ended; 0 if in time."""
        return max(0.0, (self.finish_seconds or float("inf")) - self.deadline_seconds)

    @property
    def met(self) -> bool:
        """Whether its SLO was met, as the mesh itself judged it."""
        return self.finished is not None and self.finished.slo.met

    @property
    def promise_kept(self) -> bool:
        """Whether it was ready by the 90 % quantile of the first promise."""
        p90, finish = self.promised("finish_p90"), self.finish_seconds
        return p90 is not None and finish is not None and finish <= p90

    def promised(self, name: str) -> float | None:
        """A time of the first promise, for instance ``finish_p90``."""
        if self.first_promise is None:
            return None
        return convert.seconds(getattr(self.first_promise, name)) - self.accepted_at

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        promise, finished = self.first_promise, self.finished
        return {
            "request_id": self.request_id,
            "kind": self.prompt.kind,
            "prompt": self.prompt.prompt,
            "answer": self.text,
            "right": self.right if self.prompt.checkable else None,
            "predicted_tokens_p50": promise.output_tokens_p50 if promise else None,
            "predicted_tokens_p90": promise.output_tokens_p90 if promise else None,
            "tokens": self.tokens,
            "deadline_seconds": self.deadline_seconds,
            "predicted_finish_p50_seconds": _rounded(self.promised("finish_p50")),
            "predicted_finish_p90_seconds": _rounded(self.promised("finish_p90")),
            "p_meet": _rounded(promise.p_meet) if promise else None,
            "finish_seconds": _rounded(self.finish_seconds),
            "slo_met": self.met,
            "ended": REASONS.get(finished.reason, "") if finished else "",
            "batch": finished.batch if finished else "",
            "replica": finished.replica if finished else "",
            "attempts": finished.attempts if finished else 0,
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def filler() -> inference_pb2.GenerateRequest:
    """A request that takes a slot for a while."""
    return new_request(MODEL, [("user", FILLER)], max_tokens=FILLER_TOKENS)


async def warm_up(client: Client, prompts: Sequence[DemoPrompt]) -> float:
    """Serve other prompts of the same kinds, as a mesh that has run for a while would have.

    Returns:
        Seconds per token of one answer, while all slots are taken.
    """
    rng = Random(WARM_UP_SEED)  # noqa: S311 - the same prompts every time
    tasks = [generate_task(rng, "heldout", prompt.kind) for prompt in prompts[::2]]
    measured = await asyncio.gather(*(_measure(client, task.prompt) for task in tasks))
    return median(seconds for seconds in measured if seconds is not None)


async def _measure(client: Client, prompt: str) -> float | None:
    """Seconds per token of an answer; None for one that is too short to tell."""
    finished = inference_pb2.Finished()
    async for event in client.generate(new_request(MODEL, [("user", prompt)])):
        finished = event.finished
    first = convert.seconds(finished.timings.first_token_at)
    last = convert.seconds(finished.timings.finished_at)
    tokens = finished.usage.output_tokens
    return (last - first) / (tokens - 1) if tokens >= MEASURED_TOKENS else None


async def run_burst(
    client: Client,
    prompts: Sequence[DemoPrompt],
    calibration: Calibration,
    slots: int,
    started: Callable[[list[Row]], None],
    changed: Callable[[Row], None],
) -> list[Row]:
    """Take all slots, then submit all prompts at once and follow them to their ends.

    Args:
        client: of the mesh.
        prompts: the burst.
        calibration: gives their deadlines.
        slots: how many answers run at once.
        started: told the rows when they are submitted.
        changed: told a row after every event of it.
    """
    fillers = [client.generate(filler()) for _ in range(slots)]
    await asyncio.gather(*(_first_token(stream) for stream in fillers))
    rows = [Row(prompt, calibration.deadline_seconds(prompt)) for prompt in prompts]
    started(rows)

    async def follow(row: Row) -> None:
        request = new_request(
            MODEL,
            [("user", row.prompt.prompt)],
            max_tokens=row.prompt.max_tokens,
            deadline_seconds=row.deadline_seconds,
        )
        async for event in client.generate(request):
            row.take(event)
            changed(row)

    async def drain(stream: Any) -> None:
        async for _ in stream:
            pass

    await asyncio.gather(*map(follow, rows), *map(drain, fillers))
    return rows


async def _first_token(stream: Any) -> None:
    async for event in stream:
        if event.WhichOneof("event") in {"tokens", "finished"}:
            return
