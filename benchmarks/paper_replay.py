"""The paper's experiment as its scripts run it: all requests at once, one padded batch at a time.

Devices, caps and objectives are those of each method's own script (HYIUYOU/UELLM), which is what
``benchmarks.paper`` then corrects. Times are of a step model, not of a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uellm.core.cost import StepCost, chunk_pairs
from uellm.policy.batching import Batch, Candidate, OdbsSettings, Room, coded_slo_odbs, fifo
from uellm.policy.batching import slo_odbs as equations
from uellm.simulator.platforms import Platform

POSITION_SECONDS = {1: 0.0261, 2: 0.0357, 3: 0.0400, 4: 0.0420}
"""A decoded position of ChatGLM2-6B in their naive pipeline over so many GPUs, as they measured."""
_WEIGHTS = 0.0134
"""12.5 GB of weights at 936 GB/s; the rest of a position is overhead of their software."""
SLO_SECONDS = ((220, 250), (180, 220), (150, 180), (100, 120), (90, 100))
"""Objectives of each fifth of their requests, in the order of the file."""
_CAP_MARGIN = 50
_S3_REQUESTS, _S3_TOKENS = 20, 1024


@dataclass(frozen=True, slots=True)
class Task:
    """A request of their experiment.

    Attributes:
        prompt_tokens: of the prompt.
        reference_tokens: length of the reference answer, which their schedulers are told.
        own_tokens: what the model answers if it is not cut off.
        slo_seconds: time allowed from the start of the run.
    """

    prompt_tokens: int
    reference_tokens: int
    own_tokens: int
    slo_seconds: float


@dataclass(frozen=True, slots=True)
class Method:
    """How one of their scripts runs.

    Attributes:
        name: in the paper.
        gpus: of the naive pipeline it runs on.
        batcher: its batches: ``coded`` or ``equations`` of SLO-ODBS, ``s3``, or ``fifo``.
        capped: answers end at the longest reference of their batch and 50 tokens.
        tested: half of its batches run first, on two GPUs, as a stress test.
        published: seconds in all, and share of objectives missed, that the paper reports.
    """

    name: str
    gpus: int
    batcher: str
    capped: bool = False
    tested: bool = False
    published: tuple[float, float] | None = None


METHODS = (
    Method("UELLM", 1, "coded", capped=True, published=(65.2, 0.0)),
    Method("UELLM, its equations", 1, "equations", capped=True),
    Method("UELLM-batch", 4, "coded", capped=True, published=(254.4, 0.126)),
    Method("UELLM-deploy", 1, "fifo", published=(129.1, 0.234)),
    Method("Morphling", 1, "fifo", tested=True, published=(339.2, 0.296)),
    Method("S3", 4, "s3", published=(533.6, 0.462)),
)


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of a method.

    Attributes:
        seconds: until the last batch is over, a stress test included.
        per_second: requests.
        latency: mean seconds from the start of the run to the end of a request's batch.
        violations: share of the requests whose batch ended after their objective.
        utilisation: share of the time of all its GPUs in which one streams weights or computes.
        redundant_kv: share of the KV entries written that no answer is made of: padding of
            prompts, and steps of those that had ended.
        cut: share of the answers that the cap cut off.
    """

    seconds: float
    per_second: float
    latency: float
    violations: float
    utilisation: float
    redundant_kv: float
    cut: float


def their_platform(gpus: int = 1) -> Platform:
    """ChatGLM2-6B in float16 in a naive pipeline of GPUs with 24 GB.

    Its two KV groups take 28.7 KB a token: 8.6 GB beside the weights hold 300,000 of them.
    """
    overhead = POSITION_SECONDS[gpus] - _WEIGHTS
    cost = StepCost(overhead, _WEIGHTS, 0.3e-3, 0.031e-6, 10e-9)
    return Platform(f"chatglm2-6b on {gpus}", cost, 300_000, 256, 2048)


def objectives(count: int, rng: np.random.Generator) -> list[float]:
    """Their objectives, by position: the later in the file, the tighter."""
    fifths = [SLO_SECONDS[5 * i // count] for i in range(count)]
    return [float(rng.integers(low, high, endpoint=True)) for low, high in fifths]


def replay(method: Method, tasks: Sequence[Task], *, alike: bool = False) -> Replayed:
    """Run a method's batches one after the other.

    Args:
        method: which.
        tasks: in the order of the file.
        alike: on one GPU and without a cap, like every other method.
    """
    gpus = 1 if alike else method.gpus
    cost = their_platform(gpus).cost
    batches = [[tasks[int(c.request_id)] for c in batch] for batch in _batches(method, tasks)]
    runs = [_Batch.of(batch, cost, capped=method.capped and not alike) for batch in batches]
    ends = np.cumsum([run.seconds for run in runs])
    before = 0.0
    if method.tested and not alike:
        testing = their_platform(2).cost
        before = sum(_Batch.of(b, testing, False).seconds for b in batches[: len(batches) // 2])
    total = before + float(ends[-1])
    late = sum(t.slo_seconds < end for b, end in zip(batches, ends, strict=True) for t in b)
    return Replayed(
        seconds=total,
        per_second=len(tasks) / total,
        latency=sum(len(b) * float(end) for b, end in zip(batches, ends, strict=True)) / len(tasks),
        violations=float(late) / len(tasks),
        utilisation=sum(run.computing for run in runs) / (gpus * float(ends[-1])),
        redundant_kv=1 - sum(run.useful for run in runs) / sum(run.entries for run in runs),
        cut=sum(run.cut for run in runs) / len(tasks),
    )


def _batches(method: Method, tasks: Sequence[Task]) -> list[Batch]:
    """Candidates by number; their rooms know no memory."""
    candidates = [
        Candidate(str(i), float(i), t.slo_seconds, float(t.reference_tokens), 0.0, t.prompt_tokens)
        for i, t in enumerate(tasks)
    ]
    room = Room(len(tasks))
    if method.batcher == "coded":
        return coded_slo_odbs(candidates, room, OdbsSettings())
    if method.batcher == "equations":
        return equations(candidates, room, OdbsSettings())
    return fifo(candidates, room, 10) if method.batcher == "fifo" else _their_s3(candidates)


def _their_s3(candidates: Sequence[Candidate]) -> list[Batch]:
    """S3 as their script has it: by length, up to 20 whose answers add up to at most 1,024."""
    batches: list[Batch] = []
    tokens = 0.0
    for candidate in sorted(candidates, key=lambda c: (c.output_tokens, c.arrived_at)):
        tokens += candidate.output_tokens
        if batches and len(batches[-1]) < _S3_REQUESTS and tokens <= _S3_TOKENS:
            batches[-1].append(candidate)
        else:
            batches.append([candidate])
            tokens = candidate.output_tokens
    return batches


@dataclass(frozen=True, slots=True)
class _Batch:
    """A padded batch: its seconds, those of computing, its KV entries, answers cut off."""

    seconds: float
    computing: float
    entries: int
    useful: int
    cut: int

    @classmethod
    def of(cls, tasks: Sequence[Task], cost: StepCost, capped: bool) -> "_Batch":
        cap = max(t.reference_tokens for t in tasks) + _CAP_MARGIN
        outputs = [min(t.own_tokens, cap) if capped else t.own_tokens for t in tasks]
        rows, width, longest = len(tasks), max(t.prompt_tokens for t in tasks), max(outputs)
        context = rows * (width + longest / 2)
        prefill = cost.seconds(rows * width, pairs=rows * chunk_pairs(0, width))
        seconds = prefill + (longest - 1) * cost.seconds(rows, context)
        return cls(
            seconds=seconds,
            computing=seconds - longest * cost.overhead,
            entries=rows * (width + longest - 1),
            useful=sum(t.prompt_tokens + o - 1 for t, o in zip(tasks, outputs, strict=True)),
            cut=sum(o < t.own_tokens for t, o in zip(tasks, outputs, strict=True)),
        )
