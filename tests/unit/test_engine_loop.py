"""The engine loop over the instant runner: what runs when, and what is said about it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uellm_worker.engine.capacity import Capacity, Vocabulary
from uellm_worker.engine.loop import EngineLoop
from uellm_worker.engine.plan import Copy, Release, StepPlan, StepResult

from tests.support.engine_loop import (
    VOCAB,
    Clock,
    FunctionPolicy,
    Recorder,
    add,
    expected,
    make_loop,
    run,
    take,
)
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
from uellm.v1.engine_pb2 import AddSequence, DropSequence


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


def test_prompts_are_computed_in_the_order_that_was_decided() -> None:
    def decide(view: EngineView) -> StepDecision:
        names = tuple(s.request_id for s in view.waiting)
        return StepDecision(admit=names, chunk_tokens=6, prefill=("c",))

    loop = make_loop(policy=FunctionPolicy(decide), slots=3)
    for name in "abc":
        loop.add(add(name, prompt=6, max_tokens=2))
    firsts = []
    while loop.busy:
        report = loop.step()
        firsts += [output.request_id for output in report.outputs] if report else []
    assert list(dict.fromkeys(firsts)) == ["c", "a", "b"]


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
            admit=tuple(s.request_id for s in view.waiting),
            preempt=preempt,
            chunk_tokens=512,
            reconsider_at=0.0,
        )

    loop = make_loop(slots=1, policy=FunctionPolicy(decide))
    loop.add(add("a", max_tokens=12, seed=4))
    tokens, _ = run(loop)
    assert tokens["a"] == expected(4, 12)
    report = loop.report()
    # The prompt and two tokens of the answer; the last token is not computed.
    assert report.recomputed_tokens == 3 + 2
    assert report.computed_tokens == 3 + 11 + report.recomputed_tokens


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


def test_the_policy_is_told_when_the_first_token_came() -> None:
    """What lost its slot keeps the time."""
    seen: list[float | None] = []

    def decide(view: EngineView) -> StepDecision:
        (sequence,) = (*view.running, *view.waiting)
        seen.append(sequence.first_token_at)
        preempt = (sequence.request_id,) if len(seen) == 4 else ()
        return StepDecision(
            admit=(sequence.request_id,), preempt=preempt, chunk_tokens=2, reconsider_at=0.0
        )

    loop = make_loop(policy=FunctionPolicy(decide))
    loop.add(add("a", prompt=4, max_tokens=5))
    assert run(loop)[0] == {"a": expected(0, 5)}
    assert seen[:2] == [None, None]
    assert seen[2] is not None
    assert set(seen[2:]) == {seen[2]}


def test_the_policy_is_told_whose_a_sequence_is() -> None:
    seen: list[str] = []

    def decide(view: EngineView) -> StepDecision:
        seen.extend(s.tenant for s in (*view.waiting, *view.running))
        names = tuple(s.request_id for s in view.waiting)
        return StepDecision(admit=names, chunk_tokens=64, reconsider_at=0.0)

    loop = make_loop(policy=FunctionPolicy(decide))
    loop.add(add("a", max_tokens=3, tenant="alice"))
    run(loop)
    assert set(seen) == {"alice"}
    assert len(seen) == 3


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
