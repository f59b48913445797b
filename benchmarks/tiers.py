"""Requests of three classes to the demo model, as they arrive at a live mesh.

As the simulator's ``tier`` workload: half interactive (a first token soon, then a steady pace),
three in ten an application's (short answers by a deadline), two in ten a batch's (long answers,
late deadlines). Objectives are multiples of an unloaded step, so that they ask the same of any
machine. What is asked is never part of the model's training data, and the model ends its answers
itself: no cap betrays their lengths.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from uellm import convert
from uellm.cli.promises import ANSWERED
from uellm.client import Client, new_request
from uellm.core.request import Priority, ResourceProfile
from uellm.demo.tasks import Kind, generate_task
from uellm.simulator.mesh import Outcome, Record
from uellm.simulator.requests import Request
from uellm.simulator.workloads import Objective
from uellm.v1 import common_pb2, inference_pb2

MOST_TOKENS = 400
"""Cap on every answer; right ones are shorter."""


@dataclass(frozen=True, slots=True)
class Tier:
    """A class of requests.

    Attributes:
        name: its name.
        share: of all requests.
        kinds: tasks of the demo model.
        objective: in unloaded steps.
        priority: urgency class.
    """

    name: str
    share: float
    kinds: Sequence[Kind]
    objective: Objective
    priority: Priority


TIERS = (
    Tier(
        "interactive",
        0.5,
        ("list", "story", "count"),
        Objective(ttft=200, tpot=10),
        Priority.INTERACTIVE,
    ),
    Tier("app", 0.3, ("add", "spell", "reverse"), Objective(deadline=500), Priority.NORMAL),
    Tier("batch", 0.2, ("count", "repeat"), Objective(deadline=5000), Priority.BATCH),
)


@dataclass(frozen=True, slots=True)
class Job:
    """A request that is to arrive ``arrival`` seconds after the start; ``objective`` in seconds."""

    arrival: float
    prompt: str
    tier: Tier
    objective: Objective


@dataclass(frozen=True, slots=True)
class Answered:
    """What became of a job.

    Attributes:
        record: by the client's clock.
        profile: what was predicted of it.
        timings: what the services say of it, by the clock of Redis.
    """

    record: Record
    profile: ResourceProfile
    timings: common_pb2.Timings


def draw(rate: float, cv: float, count: int, step_seconds: float, seed: int) -> list[Job]:
    """Jobs in order of arrival. Those of one seed differ in nothing but their pace.

    Args:
        rate: arrivals per second; gaps are Gamma distributed.
        cv: coefficient of variation of the gaps.
        count: how many.
        step_seconds: an unloaded step's.
        seed: of everything drawn.
    """
    rng = Random(seed)
    shape = 1 / cv**2
    at = 0.0
    jobs = []
    for _ in range(count):
        at += rng.gammavariate(shape, 1 / shape)
        (tier,) = rng.choices(TIERS, [tier.share for tier in TIERS])
        task = generate_task(rng, "heldout", rng.choice(tier.kinds))
        wanted = tier.objective
        scaled = Objective(
            *(
                None if steps is None else steps * step_seconds
                for steps in (wanted.deadline, wanted.ttft, wanted.tpot)
            )
        )
        jobs.append(Job(at / rate, task.prompt, tier, scaled))
    return jobs


def message_of(job: Job, model: str, *, refuse: bool) -> inference_pb2.GenerateRequest:
    """The job as a request of the public API."""
    request = new_request(
        model,
        [("user", job.prompt)],
        max_tokens=MOST_TOKENS,
        deadline_seconds=job.objective.deadline,
        ttft_seconds=job.objective.ttft,
        refuse=refuse,
    )
    if job.objective.tpot is not None:
        request.slo.tpot.CopyFrom(convert.duration(job.objective.tpot))
    request.slo.priority = common_pb2.Priority.ValueType(job.tier.priority)
    return request


async def drive(
    client: Client, model: str, jobs: Sequence[Job], clock: "Clock", *, refuse: bool = False
) -> list[Answered]:
    """Send every job at its time, whether or not earlier ones are answered; wait for all ends."""
    began = clock.now()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for number, job in enumerate(jobs):
            await asyncio.sleep(max(0.0, began + job.arrival - clock.now()))
            tasks.append(group.create_task(_follow(client, model, number, job, clock, refuse)))
    return [task.result() for task in tasks]


class Clock:
    """Seconds since the epoch that never run backwards: the event loop's, set once."""

    def __init__(self, epoch: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._offset = epoch - self._loop.time()

    def now(self) -> float:
        """The time."""
        return self._loop.time() + self._offset


async def _follow(
    client: Client, model: str, number: int, job: Job, clock: Clock, refuse: bool
) -> Answered:
    arrival = clock.now()
    profile = promise = promised_at = first = None
    finished = inference_pb2.Finished()
    async for event in client.generate(message_of(job, model, refuse=refuse)):
        match event.WhichOneof("event"):
            case "accepted":
                profile = convert.profile_from_proto(event.accepted.profile)
            case "promise" if promise is None:
                promise, promised_at = convert.promise_from_proto(event.promise), clock.now()
            case "tokens":
                first = first or clock.now()
            case "finished":
                finished = event.finished
    if profile is None:
        raise RuntimeError(f"{job.prompt!r} was not accepted: {finished.failure.message}")
    objective = job.objective
    request = Request(
        request_id=f"r{number:07d}",
        arrival=arrival,
        prompt_tokens=profile.prompt_tokens,
        output_tokens=max(finished.usage.output_tokens, 1),
        kind=job.tier.name,
        max_tokens=MOST_TOKENS,
        deadline=objective.deadline,
        ttft=objective.ttft,
        tpot=objective.tpot,
        priority=job.tier.priority,
    )
    record = Record(
        request,
        outcome=_outcome(finished),
        finished_at=clock.now(),
        first_token_at=first,
        promise=promise,
        promised_at=promised_at or 0.0,
    )
    return Answered(record, profile, finished.timings)


def _outcome(finished: inference_pb2.Finished) -> Outcome:
    if finished.reason in ANSWERED:
        return Outcome.FINISHED
    if finished.reason == common_pb2.FINISH_REASON_EXPIRED:
        return Outcome.EXPIRED
    if finished.reason == common_pb2.FINISH_REASON_REFUSED:
        return Outcome.REFUSED
    reason = common_pb2.FinishReason.Name(finished.reason)
    raise RuntimeError(f"a request ended as {reason}: {finished.failure.message}")
