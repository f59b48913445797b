"""The engine under memory pressure, with prompts that begin alike, against transformers.

Sequences arrive, lose their slots and are dropped at random; the budget holds a few of them. What
is served from the cache must be what would have been computed.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    from uellm_worker.verification.pipeline import Pipeline, PreemptOnce, generate
    from uellm_worker.verification.reference import Reference

from uellm_worker.engine.plan import StepPlan  # noqa: E402

from uellm.policy.fcfs import FcfsStep  # noqa: E402
from uellm.policy.views import EngineView, StepDecision  # noqa: E402
from uellm.v1 import common_pb2  # noqa: E402
from uellm.v1.engine_pb2 import AddSequence, DropSequence, StepReport  # noqa: E402

LAYERS, VOCAB, CONTEXT, BLOCK = 3, 97, 128, 16
BLOCKS = 11
SYSTEM_PROMPTS = (0, 18, 33, 60)


@dataclass
class Rough:
    """First come, first served, in short chunks; now and then somebody loses its slot."""

    random: Random
    name = "rough"

    def step(self, engine: EngineView, now: float) -> StepDecision:
        decision = FcfsStep().step(engine, now)
        preempt = [s.request_id for s in engine.running if self.random.random() < 0.01]
        chunk_tokens = self.random.randint(1, 40)
        return replace(
            decision, preempt=tuple(preempt), chunk_tokens=chunk_tokens, reconsider_at=now
        )


@dataclass
class Run:
    """What came of a run."""

    pipeline: Pipeline
    random: Random
    answers: dict[str, list[int]] = field(default_factory=dict)
    prompts: dict[str, list[int]] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    hits: int = 0
    preemptions: int = 0

    def arrive(self, number: int) -> AddSequence:
        length = self.random.choice(SYSTEM_PROMPTS)
        tail = [self.random.randrange(3, VOCAB) for _ in range(self.random.randint(1, 20))]
        prompt = [(7 * length + i) % (VOCAB - 3) + 3 for i in range(length)] + tail
        self.prompts[str(number)] = prompt
        self.answers[str(number)] = []
        # Shorter than it turns out to be, so that sequences outgrow what they reserved.
        lengths = common_pb2.QuantileFunction(levels=[0.5, 0.9], values=[2, 8])
        return AddSequence(
            request_id=str(number),
            token_ids=prompt,
            prompt_tokens=len(prompt),
            sampling=common_pb2.Sampling(max_tokens=self.random.randint(1, 30)),
            profile=common_pb2.ResourceProfile(output_tokens=lengths),
        )

    def take(self, report: StepReport) -> None:
        for output in report.outputs:
            assert output.finish != common_pb2.FINISH_REASON_FAILED, output.failure.message
            assert output.request_id not in self.ended
            self.answers[output.request_id] += output.token_ids
            if output.finish:
                self.ended.add(output.request_id)
        figures = report.report
        assert figures.kv_tokens_used <= figures.kv_tokens_reserved <= BLOCKS * BLOCK
        assert figures.kv_tokens_committed <= figures.kv_tokens_total == BLOCKS * BLOCK
        assert figures.kv_tokens_free == figures.kv_tokens_total - figures.kv_tokens_reserved
        self.hits = figures.prefix_hit_tokens

    def check_memory(self) -> None:
        """No stage has more in its memory than was granted."""
        for stage in self.pipeline.stages:
            for part in stage.parts:
                for tensor in (*part.cache.keys, *part.cache.values):
                    blocks = tensor.unflatten(2, (-1, BLOCK)).abs().amax(dim=(1, 3, 4))
                    assert int((blocks > 0).sum()) <= BLOCKS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """Its heads have 64 numbers of 4 bytes: a block of 16 tokens is a page of 4 KiB."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    torch.set_num_threads(1)
    made = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    directory = tmp_path_factory.mktemp("prefixes")
    made.save_pretrained(directory)
    yield directory, made.eval()


@pytest.mark.parametrize(("split", "seed"), [((3,), 4), ((1, 2), 1), ((2, 1), 2), ((1, 1, 1), 3)])
def test_answers_are_exact_however_short_memory_is(
    split: tuple[int, ...], seed: int, model: tuple[Path, Any]
) -> None:
    directory, whole = model
    random = Random(seed)  # noqa: S311
    pipeline = Pipeline(directory, split, slots=4, max_tokens=CONTEXT, kv_tokens=BLOCKS * BLOCK)
    assert pipeline.capacity.block_tokens == BLOCK
    run = Run(pipeline, random)
    # Numbers of its own: who comes and goes does not depend on how often the policy is asked.
    loop = pipeline.loop(Rough(Random(seed)))  # noqa: S311
    arrivals, dropped = 30, set[str]()
    for step in range(5000):
        if arrivals and random.random() < 0.2:
            arrivals -= 1
            loop.add(run.arrive(arrivals))
        alive = sorted(run.prompts.keys() - run.ended)
        if alive and random.random() < 0.05:
            gone = random.choice(alive)
            loop.drop(DropSequence(request_id=gone))
            dropped.add(gone)
            run.ended.add(gone)
        report = loop.step() if loop.busy else None
        if report is not None:
            run.take(report)
        if step % 16 == 0:
            run.check_memory()
        if not arrivals and not loop.busy:
            break
    assert len(run.ended) == 30
    assert len(dropped) > 0
    assert run.hits > 100
    reference = Reference(whole)
    for name, prompt in run.prompts.items():
        answer = run.answers[name]
        count = len(answer) if name in dropped else max(len(answer), 1)
        assert reference.compare(prompt, answer, count).difference is None, name


@pytest.mark.parametrize("split", [(3,), (1, 2), (1, 1, 1)])
def test_answers_are_exact_when_steps_do_not_fit_into_memory(
    split: tuple[int, ...], model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any stage may fail, before or after it wrote to its cache, or where tokens are chosen."""
    directory, whole = model
    random = Random(5)  # noqa: S311
    pipeline = Pipeline(directory, split, slots=4, max_tokens=CONTEXT, kv_tokens=BLOCKS * BLOCK)
    calls: Counter[str] = Counter()
    failed: list[str] = []

    def unreliable(name: str, place: int, work: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(plan: StepPlan, *arguments: Any) -> Any:
            calls[name] += plan.rows > 1
            if calls[name] != 2 + 3 * place or name in failed:
                return work(plan, *arguments)
            failed.append(name)
            if place % 2:
                work(plan, *arguments)
            raise MemoryError(name)

        return attempt

    for index, stage in enumerate(pipeline.stages):
        (part,) = stage.parts
        monkeypatch.setattr(part, "compute", unreliable(f"stage {index}", index, part.compute))
    last = pipeline.stages[-1]
    monkeypatch.setattr(last, "sample", unreliable("choice", len(split), last.sample))
    run = Run(pipeline, random)
    loop = pipeline.loop(Rough(Random(5)))  # noqa: S311
    for number in range(10):
        loop.add(run.arrive(number))
    while loop.busy:
        report = loop.step()
        if report is not None:
            run.take(report)
    assert set(failed) == {*(f"stage {index}" for index in range(len(split))), "choice"}
    assert len(run.ended) == 10
    reference = Reference(whole)
    for name, prompt in run.prompts.items():
        answer = run.answers[name]
        assert reference.compare(prompt, answer, max(len(answer), 1)).difference is None, name


def test_a_step_under_way_behind_one_that_does_not_fit_harms_nobody(
    model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last stage never computed the step that gave the sequence its slot."""
    directory, whole = model
    pipeline = Pipeline(directory, (1, 2), slots=1, max_tokens=CONTEXT)
    first = pipeline.stages[0]
    compute, plans = first.compute, list[StepPlan]()

    def once_too_large(plan: StepPlan, activation: Any) -> Any:
        plans.append(plan)
        if len(plans) == 1:
            raise MemoryError("the first")
        return compute(plan, activation)

    monkeypatch.setattr(first, "compute", once_too_large)
    prompt = [3 + 5 * i % 90 for i in range(24)]
    loop = pipeline.loop(PreemptOnce(chunk_tokens=24))
    assert generate(loop, [prompt], lambda _: common_pb2.Sampling(max_tokens=6)) == [
        Reference(whole).greedy(prompt, 6)[0]
    ]
    assert [plan.chunks[0].start for plan in plans[:3]] == [0, 12, 0]
