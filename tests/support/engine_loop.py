"""The engine loop over the instant runner, whose plans are kept and checked."""

from collections.abc import Callable

from uellm_worker.engine.capacity import Capacity, Vocabulary
from uellm_worker.engine.instant import InstantRunner
from uellm_worker.engine.loop import EngineLoop
from uellm_worker.engine.plan import Copy, StepPlan, StepResult
from uellm_worker.engine.randomness import instant_token
from uellm_worker.engine.recorder import StepRecorder

from uellm.policy.fcfs import FcfsStep
from uellm.policy.views import EngineView, StepDecision
from uellm.v1.common_pb2 import (
    Sampling,
)
from uellm.v1.engine_pb2 import AddSequence, StepReport

VOCAB = 500


class Clock:
    """Every look at it is later than the last."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class FunctionPolicy:
    """A step policy made of a function."""

    name = "function"

    def __init__(self, decide: Callable[[EngineView], StepDecision]) -> None:
        self.decide = decide

    def step(self, engine: EngineView, now: float) -> StepDecision:
        del now
        return self.decide(engine)


class Recorder(InstantRunner):
    """Keeps the plans, and checks each against what the cache would hold."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__(VOCAB)
        self._depth = depth
        self.plans: list[StepPlan] = []
        self.held: dict[int, int] = {}
        self.log: list[str] = []

    @property
    def depth(self) -> int:
        return self._depth

    def submit(self, plan: StepPlan) -> None:
        self.log.append("submit")
        assert 1 <= self.under_way <= self.depth
        self.plans.append(plan)
        for move in plan.moves:
            if isinstance(move, Copy):
                assert self.held[move.source] >= move.tokens
                self.held[move.slot] = move.tokens
            else:
                self.held[move.slot] = min(self.held.get(move.slot, 0), move.from_token)
        assert plan.rows == len(plan.token_ids)
        assert len({chunk.slot for chunk in plan.chunks}) == len(plan.chunks)
        for chunk in plan.chunks:
            assert chunk.start <= self.held.get(chunk.slot, 0)
            self.held[chunk.slot] = chunk.start + chunk.count
        super().submit(plan)

    def collect(self, *, patient: bool = True) -> StepResult | None:
        assert patient or self.under_way < self.depth, "nothing can be added"
        self.log.append("collect")
        return super().collect()

    @property
    def under_way(self) -> int:
        return self.log.count("submit") - self.log.count("collect")


def make_loop(
    slots: int = 4,
    max_tokens: int = 64,
    kv_tokens: int | None = None,
    policy: FunctionPolicy | FcfsStep | None = None,
    runner: InstantRunner | None = None,
    eos_ids: frozenset[int] = frozenset(),
    recorder: StepRecorder | None = None,
    execution: str = "continuous",
) -> EngineLoop:
    capacity = Capacity(slots, max_tokens, kv_tokens or slots * max_tokens)
    return EngineLoop(
        runner or Recorder(),
        policy or FcfsStep(),
        capacity,
        Vocabulary(VOCAB, eos_ids),
        epoch=7,
        now=Clock(),
        recorder=recorder,
        execution=execution,
    )


def add(
    request_id: str,
    prompt: int = 3,
    max_tokens: int | None = 5,
    logged: tuple[int, ...] = (),
    seed: int = 0,
    **fields: object,
) -> AddSequence:
    tokens = [(i % (VOCAB - 1)) + 1 for i in range(prompt)] + list(logged)
    return AddSequence(
        request_id=request_id,
        generation=1,
        token_ids=tokens,
        prompt_tokens=prompt,
        sampling=Sampling(max_tokens=max_tokens, seed=seed),
        **fields,  # type: ignore[arg-type]
    )


def expected(seed: int, count: int, offset: int = 0) -> list[int]:
    return [instant_token(seed, position, VOCAB) for position in range(offset, count)]


def run(loop: EngineLoop, limit: int = 2000) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Step until nothing is left: tokens and finish by request."""
    tokens: dict[str, list[int]] = {}
    ends: dict[str, int] = {}
    for _ in range(limit):
        if not loop.busy:
            return tokens, ends
        report = loop.step()
        assert report is not None, "the loop stalled"
        take(report, tokens, ends)
    raise AssertionError("the loop does not come to an end")


def take(report: StepReport, tokens: dict[str, list[int]], ends: dict[str, int]) -> None:
    for output in report.outputs:
        assert output.request_id not in ends
        tokens.setdefault(output.request_id, []).extend(output.token_ids)
        if output.finish:
            ends[output.request_id] = output.finish
