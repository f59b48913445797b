"""The engine loop over the instant runner: what runs when, and what is said about it."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uellm_worker.engine.capacity import Capacity, Vocabulary
from uellm_worker.engine.errors import PeerLostError
from uellm_worker.engine.instant import InstantRunner
from uellm_worker.engine.loop import EngineLoop
from uellm_worker.engine.plan import Copy, Release, StepPlan, StepResult
from uellm_worker.engine.randomness import instant_token

from uellm.policy.fcfs import FcfsStep
from uellm.policy.views import EngineView, StepDecision
from uellm.v1.common_pb2 import (
    FINISH_REASON_FAILED,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    QuantileFunction,
    ResourceProfile,
    Sampling,
    Slo,
)
from uellm.v1.engine_pb2 import AddSequence, DropSequence, StepReport

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
) -> EngineLoop:
    capacity = Capacity(slots, max_tokens, kv_tokens or slots * max_tokens)
    return EngineLoop(
        runner or Recorder(),
        policy or FcfsStep(),
        capacity,
        Vocabulary(VOCAB, eos_ids),
        epoch=7,
        now=Clock(),
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


def test_sequences_of_any_number_get_the_tokens_of_their_seed() -> None:
    loop = make_loop(slots=3)
    for i in range(10):
        loop.add(add(str(i), prompt=1 + i, max_tokens=1 + i, seed=i))
    tokens, ends = run(loop)
    assert tokens == {str(i): expected(i, 1 + i) for i in range(10)}
    assert set(ends.values()) == {FINISH_REASON_LENGTH}


def test_a_resumed_sequence_continues_its_answer() -> None:
    loop = make_loop()
    whole = expected(5, 9)
    loop.add(add("a", max_tokens=9, logged=tuple(whole[:4]), seed=5))
    assert run(loop)[0] == {"a": whole[4:]}


@pytest.mark.parametrize(("prompt", "logged"), [(3, 5), (64, 0)])
def test_a_sequence_that_is_complete_on_arrival_ends_at_once(prompt: int, logged: int) -> None:
    loop = make_loop(max_tokens=64)
    loop.add(add("a", prompt=prompt, max_tokens=5, logged=(1,) * logged))
    report = loop.step()
    assert report is not None
    assert [output.finish for output in report.outputs] == [FINISH_REASON_LENGTH]
    assert report.report.step == 0
    assert not loop.busy


def test_an_answer_ends_when_the_context_is_full() -> None:
    loop = make_loop(max_tokens=10)
    loop.add(add("a", prompt=4, max_tokens=None))
    tokens, ends = run(loop)
    assert (len(tokens["a"]), ends["a"]) == (6, FINISH_REASON_LENGTH)


def test_the_end_of_sequence_token_is_not_emitted() -> None:
    answer = expected(3, 20)
    loop = make_loop(eos_ids=frozenset({answer[6]}))
    loop.add(add("a", max_tokens=20, seed=3))
    tokens, ends = run(loop)
    assert tokens["a"] == answer[: answer.index(answer[6])]
    assert ends["a"] == FINISH_REASON_STOP


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (add("x", adapter="lora"), "ADAPTER_NOT_FOUND"),
        (AddSequence(request_id="x"), "PROMPT_INVALID"),
        (AddSequence(request_id="x", token_ids=[1], prompt_tokens=2), "PROMPT_INVALID"),
        (
            AddSequence(request_id="x", token_ids=[VOCAB], prompt_tokens=1),
            "TOKEN_OUT_OF_VOCABULARY",
        ),
        (add("x", prompt=65), "CONTEXT_EXCEEDED"),
        (
            AddSequence(
                request_id="x", token_ids=[1], prompt_tokens=1, sampling=Sampling(temperature=-1)
            ),
            "SAMPLING_INVALID",
        ),
        (
            AddSequence(
                request_id="x", token_ids=[1], prompt_tokens=1, sampling=Sampling(top_p=1.5)
            ),
            "SAMPLING_INVALID",
        ),
        (
            add(
                "x",
                profile=ResourceProfile(
                    output_tokens=QuantileFunction(levels=[0.5, 0.2], values=[1, 2])
                ),
            ),
            "PROFILE_INVALID",
        ),
        (add("x", slo=Slo(priority=9)), "SLO_INVALID"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_served_fails_alone(command: AddSequence, reason: str) -> None:
    loop = make_loop()
    loop.add(add("good", seed=1))
    loop.add(command)
    report = loop.step()
    assert report is not None
    failed = next(output for output in report.outputs if output.request_id == "x")
    assert (failed.finish, failed.failure.reason) == (FINISH_REASON_FAILED, reason)
    assert failed.failure.message
    tokens: dict[str, list[int]] = {}
    take(report, tokens, {})
    for request_id, rest in run(loop)[0].items():
        tokens[request_id] += rest
    assert tokens["good"] == expected(1, 5)


def test_logits_that_are_not_finite_fail_one_sequence_and_wipe_its_slot() -> None:
    class Broken(Recorder):
        def submit(self, plan: StepPlan) -> None:
            super().submit(plan)
            result = self._results.pop()
            tokens = [
                -1 if chunk.slot == 0 and plan.step == 0 else token
                for chunk, token in zip(plan.chunks, result.token_ids, strict=True)
            ]
            self._results.append(StepResult(tokens, seconds=(0.0,)))

    runner = Broken()
    loop = make_loop(slots=2, runner=runner)
    for request_id in "abc":
        loop.add(add(request_id, prompt=20))
    _, ends = run(loop)
    assert ends == {
        "a": FINISH_REASON_FAILED,
        "b": FINISH_REASON_LENGTH,
        "c": FINISH_REASON_LENGTH,
    }
    first, second = runner.plans[:2]
    assert first.moves == ()
    # The next owner takes what it can from the slot that is sound.
    assert second.moves == (Release(0, 0), Copy(1, 0, 19))
    assert [admission.slot for admission in second.admissions] == [0]


def test_dropping_frees_the_slot_before_the_next_step() -> None:
    loop = make_loop(slots=1)
    loop.add(add("a", max_tokens=50))
    loop.add(add("b", max_tokens=2, seed=2))
    loop.step()
    loop.drop(DropSequence(request_id="a", generation=2))  # Another holder's.
    loop.drop(DropSequence(request_id="nobody", generation=1))
    report = loop.step()
    assert report is not None
    assert report.report.running == 2
    loop.drop(DropSequence(request_id="a", generation=1))
    tokens, _ = run(loop)
    assert tokens == {"b": expected(2, 2)}


def test_the_same_request_again_replaces_the_first() -> None:
    loop = make_loop()
    loop.add(add("a", max_tokens=50))
    loop.step()
    again = add("a", max_tokens=2, logged=(9,))
    again.generation = 2
    loop.add(again)
    report = loop.step()
    assert report is not None
    assert [(o.generation, list(o.token_ids)) for o in report.outputs] == [(2, expected(0, 2, 1))]
    assert not loop.busy


def test_prompts_are_prefilled_in_chunks_while_others_decode() -> None:
    runner = Recorder()
    loop = make_loop(
        runner=runner,
        policy=FunctionPolicy(
            lambda view: StepDecision(
                admit=tuple(s.request_id for s in view.waiting), chunk_tokens=8
            )
        ),
    )
    loop.add(add("a", prompt=2, max_tokens=10))
    loop.step()
    loop.add(add("b", prompt=20, max_tokens=1))
    run(loop)
    assert [[c.count for c in plan.chunks] for plan in runner.plans[:4]] == [
        [2],
        [1, 8],
        [1, 8],
        [1, 4],
    ]
    assert [plan.chunks[-1].sample for plan in runner.plans[:4]] == [True, False, False, True]


def test_a_preempted_sequence_is_recomputed_and_loses_nothing() -> None:
    steps = iter(range(100))

    def decide(view: EngineView) -> StepDecision:
        preempt = ("a",) if next(steps) == 3 else ()
        return StepDecision(
            admit=tuple(s.request_id for s in view.waiting), preempt=preempt, chunk_tokens=512
        )

    loop = make_loop(slots=1, policy=FunctionPolicy(decide))
    loop.add(add("a", max_tokens=12, seed=4))
    tokens, _ = run(loop)
    assert tokens["a"] == expected(4, 12)


def test_waiting_sequences_can_be_handed_back() -> None:
    loop = make_loop(
        policy=FunctionPolicy(
            lambda view: StepDecision(hand_back=tuple(s.request_id for s in view.waiting))
        )
    )
    loop.add(add("a"))
    report = loop.step()
    assert report is not None
    assert list(report.handed_back) == ["a"]
    assert not loop.busy


def test_a_policy_that_admits_nobody_leaves_the_loop_idle() -> None:
    loop = make_loop(policy=FunctionPolicy(lambda _: StepDecision()))
    loop.add(add("a"))
    assert loop.step() is None
    assert loop.busy


def test_an_absurd_decision_does_no_harm() -> None:
    loop = make_loop(
        slots=1,
        policy=FunctionPolicy(
            lambda _: StepDecision(
                admit=("a", "nobody", "b", "a"),
                preempt=("b", "nobody"),
                hand_back=("nobody",),
                chunk_tokens=10**9,
            )
        ),
    )
    for request_id in "ab":
        loop.add(add(request_id))
    assert {k: len(v) for k, v in run(loop)[0].items()} == {"a": 5, "b": 5}


def test_reports_say_how_the_replica_is_doing() -> None:
    loop = make_loop(slots=2, max_tokens=32)
    for request_id in "abc":
        loop.add(add(request_id, prompt=4, max_tokens=3))
    first, second = loop.step(), loop.step()
    assert first is not None
    assert second is not None
    report = first.report
    assert (report.epoch, report.step, report.slots) == (7, 1, 2)
    assert (report.running, report.waiting) == (3, 1)
    assert (report.prefill_tokens, report.decode_sequences) == (8, 0)
    assert (report.kv_tokens_used, report.kv_tokens_committed) == (8, 8)
    assert (report.kv_tokens_reserved, report.kv_tokens_free) == (2 * 5, 64 - 2 * 5)
    assert (report.kv_tokens_cached, report.kv_tokens_total) == (0, 64)
    assert report.prefill_seconds_per_token > 0
    assert len(report.stages) == 1
    report = second.report
    assert (report.step, report.prefill_tokens, report.decode_sequences) == (2, 0, 2)
    assert report.context_tokens == 2 * 5
    assert report.decode_step_seconds > 0


def test_who_got_a_slot_is_told_before_the_step_computes() -> None:
    told: list[list[str]] = []

    class Watcher(Recorder):
        def submit(self, plan: StepPlan) -> None:
            if plan.admissions:
                assert len(told[-1]) == len(plan.admissions)
            super().submit(plan)

    loop = EngineLoop(
        Watcher(),
        FcfsStep(),
        Capacity(2, 64, 128),
        Vocabulary(VOCAB),
        announce=lambda report: told.append(list(report.admitted)),
    )
    for request_id in "abc":
        loop.add(add(request_id))
    run(loop)
    assert told == [["a", "b"], ["c"]]


def test_a_step_that_raises_names_its_suspects() -> None:
    class Fatal(Recorder):
        def submit(self, plan: StepPlan) -> None:
            raise RuntimeError("boom")

    loop = make_loop(slots=1, runner=Fatal())
    loop.add(add("a"))
    loop.add(add("b"))
    with pytest.raises(RuntimeError):
        loop.step()
    assert loop.suspects == ("a",)


# ---- several steps under way ---------------------------------------------------------------------


def test_as_many_steps_are_under_way_as_there_are_stages() -> None:
    runner = Recorder(depth=3)
    loop = make_loop(slots=6, runner=runner)
    for i in range(6):
        loop.add(add(str(i), max_tokens=8, seed=i))
    tokens, _ = run(loop)
    assert tokens == {str(i): expected(i, 8) for i in range(6)}
    # Three groups of two neighbours each, in turn; a new step follows every result.
    assert runner.log[:3] == ["submit"] * 3
    assert runner.log[3:-3] == ["collect", "submit"] * (3 * 7)
    slots = [[chunk.slot for chunk in plan.chunks] for plan in runner.plans]
    assert slots == [[0, 1], [2, 3], [4, 5]] * 8


def test_a_lone_sequence_waits_for_nothing() -> None:
    runner = Recorder(depth=3)
    loop = make_loop(slots=6, runner=runner)
    loop.add(add("a", max_tokens=5))
    assert run(loop)[0] == {"a": expected(0, 5)}
    assert runner.log == ["submit", "collect"] * 5


def test_fewer_sequences_than_stages_go_each_at_its_own_pace() -> None:
    runner = Recorder(depth=4)
    loop = make_loop(slots=8, runner=runner)
    loop.add(add("a", max_tokens=6))
    loop.add(add("b", max_tokens=6, seed=1))
    run(loop)
    assert runner.log[:3] == ["submit", "submit", "collect"]
    assert [plan.rows for plan in runner.plans[2:]] == [1] * 10


def test_a_lone_prompt_fills_the_pipeline() -> None:
    """Its chunks follow each other: only the last of them has a token to wait for."""
    runner = Recorder(depth=4)
    loop = make_loop(slots=1, max_tokens=600, runner=runner)
    loop.add(add("a", prompt=500, max_tokens=2))
    assert run(loop)[0] == {"a": expected(0, 2)}
    assert [plan.rows for plan in runner.plans] == [128, 128, 128, 116, 1]
    assert runner.log == ["submit"] * 4 + ["collect"] * 4 + ["submit", "collect"]


def test_a_new_sequence_does_not_wait_for_a_result() -> None:
    """A command ends the wait for a result while a stage idles."""

    class Interrupted(Recorder):
        def collect(self, *, patient: bool = True) -> StepResult | None:
            if patient or len(self.plans) > 1:
                return super().collect(patient=patient)
            return None

    runner = Interrupted(depth=2)
    loop = make_loop(slots=2, runner=runner)
    loop.add(add("a", max_tokens=4))
    assert loop.step() is None
    assert loop.busy
    assert loop.under_way
    loop.add(add("b", max_tokens=4, seed=1))
    assert run(loop)[0] == {"a": expected(0, 4), "b": expected(1, 4)}
    assert runner.log[:3] == ["submit", "submit", "collect"]


def test_who_joins_is_put_where_the_fewest_are() -> None:
    runner = Recorder(depth=2)
    loop = make_loop(slots=8, runner=runner)
    for i in range(5):
        loop.add(add(str(i), max_tokens=1 if i in (0, 2, 4) else 30))
    loop.step()
    loop.step()
    for i in range(5, 8):
        loop.add(add(str(i), max_tokens=30))
    for _ in range(6):
        loop.step()
    # Of the first five, the even ones are over: two are left in the second group.
    assert sorted(len(plan.chunks) for plan in runner.plans[-2:]) == [2, 3]


@pytest.mark.parametrize("end", ["drop", "replace", "preempt"])
def test_what_comes_too_late_is_left_out(end: str) -> None:
    preempt: list[str] = []
    policy = FunctionPolicy(
        lambda view: StepDecision(
            admit=tuple(s.request_id for s in view.waiting),
            preempt=tuple(preempt),
            chunk_tokens=512,
        )
    )
    runner = Recorder(depth=2)
    loop = make_loop(slots=2, runner=runner, policy=policy)
    for i, name in enumerate("ab"):
        loop.add(add(name, max_tokens=6, seed=i))
    report = loop.step()  # The first token of "a"; a step of "b" is under way.
    assert report is not None
    tokens: dict[str, list[int]] = {}
    take(report, tokens, {})
    if end == "preempt":
        preempt.append("b")
    else:
        loop.drop(DropSequence(request_id="b", generation=1))
        if end == "replace":
            loop.add(add("b", prompt=4, max_tokens=6, seed=1))
        else:
            loop.add(add("c", max_tokens=6, seed=2))
    report = loop.step()
    preempt.clear()
    assert report is not None
    take(report, tokens, {})
    rest, ends = run(loop)
    for name, more in rest.items():
        tokens[name] = tokens.get(name, []) + more
    wanted = {"a": expected(0, 6)}
    wanted |= {"c": expected(2, 6)} if end == "drop" else {"b": expected(1, 6)}
    assert tokens == wanted
    assert set(ends) == set(wanted)


def test_a_slot_that_is_spoilt_after_it_was_given_away_is_scrubbed() -> None:
    class Broken(Recorder):
        def submit(self, plan: StepPlan) -> None:
            super().submit(plan)
            if plan.step == 1:
                self._results[-1] = StepResult([-1], seconds=(0.0,))

    runner = Broken(depth=2)
    loop = make_loop(slots=2, runner=runner)
    for i, name in enumerate("ab"):
        loop.add(add(name, max_tokens=6, seed=i))
    tokens: dict[str, list[int]] = {}
    report = loop.step()
    assert report is not None
    take(report, tokens, {})
    loop.drop(DropSequence(request_id="b", generation=1))
    loop.add(add("heir", max_tokens=6, seed=2))
    rest, ends = run(loop)
    assert rest["heir"] == expected(2, 6)
    assert set(ends.values()) == {FINISH_REASON_LENGTH}
    later = runner.plans[2:]
    assert [a.slot for plan in later for a in plan.admissions] == [1, 1]
    assert Release(1, 0) in later[0].moves, "wiped before the heir computes"


class Small(Recorder):
    """Has memory for so many tokens of a step."""

    def __init__(self, rows: int, depth: int = 1) -> None:
        super().__init__(depth)
        self.rows = rows
        self.failures = 0

    def submit(self, plan: StepPlan) -> None:
        super().submit(plan)
        if plan.rows > self.rows:
            self.failures += 1
            self._results[-1] = StepResult((), seconds=(0.0,), out_of_memory=True)


@pytest.mark.parametrize("depth", [1, 3])
def test_steps_shrink_until_they_fit_into_memory(depth: int) -> None:
    runner = Small(rows=3, depth=depth)
    loop = make_loop(slots=6, runner=runner)
    for i in range(6):
        loop.add(add(str(i), prompt=20, max_tokens=6, seed=i))
    assert run(loop)[0] == {str(i): expected(i, 6) for i in range(6)}
    assert 0 < runner.failures < 40


def test_steps_grow_again_when_memory_is_back() -> None:
    runner = Small(rows=4)
    loop = make_loop(slots=2, max_tokens=900, runner=runner)
    loop.add(add("a", prompt=30, max_tokens=400))
    loop.step()
    while runner.failures < 3:
        loop.step()
    assert runner.plans[-1].rows < 8
    runner.rows = 10**9
    while len(runner.plans) < 300:
        loop.step()
    loop.add(add("b", prompt=90, max_tokens=1))
    run(loop)
    assert max(plan.rows for plan in runner.plans[300:]) > 30


def test_memory_for_no_token_at_all_ends_the_generation() -> None:
    loop = make_loop(runner=Small(rows=0))
    loop.add(add("a", prompt=8))
    with pytest.raises(MemoryError, match="single token"):
        run(loop)
    assert loop.suspects == ("a",)


def test_all_steps_under_way_are_suspected_when_a_peer_is_lost() -> None:
    class Lost(Recorder):
        def collect(self, *, patient: bool = True) -> StepResult | None:
            raise PeerLostError("gone")

    loop = make_loop(slots=3, runner=Lost(depth=2))
    for name in "abcd":
        loop.add(add(name))
    with pytest.raises(PeerLostError):
        loop.step()
    assert set(loop.suspects) == {"a", "b", "c"}


def test_an_error_of_a_steps_own_is_blamed_on_that_step() -> None:
    class Fatal(Recorder):
        def submit(self, plan: StepPlan) -> None:
            super().submit(plan)
            if plan.step == 1:
                raise RuntimeError("boom")

    loop = make_loop(slots=2, runner=Fatal(depth=2))
    for name in "ab":
        loop.add(add(name))
    with pytest.raises(RuntimeError):
        loop.step()
    assert loop.suspects == ("b",)


def test_an_error_in_the_choice_of_tokens_is_blamed_on_the_oldest_step() -> None:
    class Fatal(Recorder):
        def collect(self, *, patient: bool = True) -> StepResult | None:
            raise RuntimeError("boom")

    loop = make_loop(slots=2, runner=Fatal(depth=2))
    for name in "ab":
        loop.add(add(name))
    with pytest.raises(RuntimeError):
        loop.step()
    assert loop.suspects == ("a",)


def test_too_little_memory_for_a_token_is_blamed_on_its_step() -> None:
    loop = make_loop(slots=2, runner=Small(rows=0, depth=2))
    for name in "ab":
        loop.add(add(name, prompt=1))
    with pytest.raises(MemoryError, match="single token"):
        run(loop)
    assert loop.suspects == ("a",)


def test_the_policy_is_told_when_the_first_token_came() -> None:
    """What lost its slot keeps the time."""
    seen: list[float | None] = []

    def decide(view: EngineView) -> StepDecision:
        (sequence,) = (*view.running, *view.waiting)
        seen.append(sequence.first_token_at)
        preempt = (sequence.request_id,) if len(seen) == 4 else ()
        return StepDecision(admit=(sequence.request_id,), preempt=preempt, chunk_tokens=2)

    loop = make_loop(policy=FunctionPolicy(decide))
    loop.add(add("a", prompt=4, max_tokens=5))
    assert run(loop)[0] == {"a": expected(0, 5)}
    assert seen[:2] == [None, None]
    assert seen[2] is not None
    assert set(seen[2:]) == {seen[2]}


def test_the_policy_is_told_in_which_blocks_room_is_given() -> None:
    """One that does not fit in whole blocks is not overtaken by those behind it."""
    capacity = Capacity(4, 64, 6 * 16, block_tokens=16)
    loop = EngineLoop(Recorder(), FcfsStep(), capacity, Vocabulary(VOCAB), now=Clock())
    # Two blocks are left beside the first: the large one takes three.
    for name, prompt in [("first", 49), ("large", 33), ("small", 5)]:
        loop.add(add(name, prompt=prompt, max_tokens=4))
    _, ends = run(loop)
    assert list(ends) == ["first", "large", "small"]


COMMANDS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "drop", "step", "step"]),
        st.integers(0, 9),
        st.integers(1, 30),
        st.integers(1, 30),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(COMMANDS, st.integers(1, 4), st.integers(20, 90), st.integers(1, 40), st.integers(1, 4))
def test_any_mix_of_commands_under_kv_pressure_ends_with_the_right_tokens(
    commands: list[tuple[str, int, int, int]], slots: int, kv_tokens: int, chunk: int, depth: int
) -> None:
    """The runner checks every plan; the policy admits without regard to KV room."""
    policy = FunctionPolicy(
        lambda view: StepDecision(
            admit=tuple(s.request_id for s in view.waiting), chunk_tokens=chunk
        )
    )
    loop = make_loop(
        slots=slots, max_tokens=64, kv_tokens=kv_tokens, policy=policy, runner=Recorder(depth)
    )
    wanted: dict[str, list[int]] = {}
    tokens: dict[str, list[int]] = {}
    ends: dict[str, int] = {}
    for number, (what, which, prompt, length) in enumerate(commands):
        name = f"{which}-{number}" if what == "add" else None
        if name is not None:
            loop.add(add(name, prompt=prompt, max_tokens=length, seed=number))
            room = min(64, kv_tokens)
            wanted[name] = expected(number, max(min(length, room - prompt), 0))
        elif what == "drop" and wanted:
            dropped = sorted(wanted)[which % len(wanted)]
            loop.drop(DropSequence(request_id=dropped, generation=1))
            if dropped not in ends:
                del wanted[dropped]
                tokens.pop(dropped, None)
        elif what == "step" and (report := loop.step()) is not None:
            take(report, tokens, ends)
            assert report.report.kv_tokens_free >= 0
    rest, more_ends = run(loop)
    ends |= more_ends
    for name, more in rest.items():
        tokens[name] = tokens.get(name, []) + more
    failed = {name for name, end in ends.items() if end == FINISH_REASON_FAILED}
    assert {n: tokens.get(n, []) for n in wanted if n not in failed} == {
        n: answer for n, answer in wanted.items() if n not in failed
    }
    assert set(ends) == set(wanted)
