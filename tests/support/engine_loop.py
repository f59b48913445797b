"""The engine loop over the instant runner, whose plans are kept and checked."""

from collections import deque
from collections.abc import Callable

from uellm_worker.engine.capacity import Capacity, Vocabulary
from uellm_worker.engine.instant import InstantRunner
from uellm_worker.engine.loop import EngineLoop
from uellm_worker.engine.plan import Copy, StepPlan, StepResult
from uellm_worker.engine.randomness import instant_token
from uellm_worker.engine.recorder import StepRecorder

from uellm.core.cost import StepCost, chunk_pairs
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


STAGE = StepCost(0.001, 0.008, 0.0005, 1e-6, 2e-7)
"""Of one stage, whatever the number of them."""


GUESS = StepCost(0.0, 0.1, 0.01)


class Timed(Recorder):
    """A pipeline in time of its own: every stage computes one step after the other."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__(depth)
        self.seconds = 0.0
        self._free_at = [0.0] * depth
        self._ends: deque[float] = deque()

    def submit(self, plan: StepPlan) -> None:
        super().submit(plan)
        decodes = [chunk for chunk in plan.chunks if chunk.count == 1 and chunk.start]
        prompts = [chunk for chunk in plan.chunks if chunk not in decodes]
        took = STAGE.seconds(
            plan.rows,
            sum(chunk.start + 1 for chunk in decodes),
            sum(chunk_pairs(chunk.start, chunk.count) for chunk in prompts),
        )
        at = self.seconds
        for stage, free_at in enumerate(self._free_at):
            at = self._free_at[stage] = max(at, free_at) + took
        self._ends.append(at)

    def collect(self, *, patient: bool = True) -> StepResult | None:
        self.seconds = self._ends.popleft()
        return super().collect(patient=patient)


def timed_loop(runner: Timed, slots: int = 64) -> EngineLoop:
    def admit(view: EngineView) -> StepDecision:
        seen.append(view)
        names = tuple(s.request_id for s in view.waiting)
        return StepDecision(admit=names, chunk_tokens=view.max_chunk_tokens)

    seen: list[EngineView] = []
    return EngineLoop(
        runner,
        FunctionPolicy(admit),
        Capacity(slots, 2048, slots * 2048),
        Vocabulary(VOCAB),
        now=lambda: runner.seconds,
        timer=lambda: runner.seconds,
        cost=GUESS,
    )
