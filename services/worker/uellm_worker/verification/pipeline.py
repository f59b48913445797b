"""A replica of any split within one process, under a step policy that makes life hard for it."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

import torch

from uellm.core.errors import UellmError
from uellm.models.profile import read_profile
from uellm.policy.fcfs import FcfsStep
from uellm.policy.views import EngineView, StepDecision, StepPolicy
from uellm.v1.common_pb2 import Sampling
from uellm.v1.engine_pb2 import AddSequence, PrepareShard
from uellm.v1.topology_pb2 import DeviceShard, ShardAssignment
from uellm_worker.engine.capacity import Capacity, Vocabulary
from uellm_worker.engine.flights import Share
from uellm_worker.engine.loop import EngineLoop
from uellm_worker.engine.member import ShardMember
from uellm_worker.engine.plan import StepPlan, StepResult
from uellm_worker.engine.shard_engine import load_stage, shard_specs
from uellm_worker.engine.shard_stage import ShardStage
from uellm_worker.engine.transport import Loopback


@dataclass(frozen=True, slots=True)
class PreemptOnce:
    """First come, first served, but short chunks, and every sequence loses its slot once.

    Attributes:
        chunk_tokens: most tokens that a step prefills, so that prompts take several steps.
        after_tokens: generated tokens after which a sequence is preempted.
    """

    name = "preempt-once"
    chunk_tokens: int = 13
    after_tokens: int = 3

    def step(self, engine: EngineView, now: float) -> StepDecision:
        """See ``uellm.policy.views.StepPolicy``."""
        decision = FcfsStep().step(engine, now)
        preempt = [
            sequence.request_id
            for sequence in engine.running
            if sequence.output_tokens >= self.after_tokens and not sequence.preemptions
        ]
        return replace(
            decision,
            preempt=tuple(preempt[:1]),
            chunk_tokens=self.chunk_tokens,
            reconsider_at=now,
        )


class Record:
    """How a run went: the logits behind its tokens, as long as there is room.

    Args:
        room_bytes: where recording ends.

    Attributes:
        rows: logits by request id and position in the answer.
        admissions: how often a sequence was given a slot.
    """

    def __init__(self, room_bytes: int) -> None:
        self.rows: dict[tuple[str, int], torch.Tensor] = {}
        self.admissions = 0
        self._room_bytes = room_bytes

    def add(self, request_id: str, position: int, logits: torch.Tensor) -> None:
        """Keep a row of logits."""
        self._room_bytes -= logits.numel() * 4
        if self._room_bytes >= 0:
            self.rows[request_id, position] = logits.float().cpu().clone()


class _ListeningStage(ShardStage):
    """Keeps the logits of its last step."""

    logits: torch.Tensor | None = None

    def sample(self, plan: StepPlan, logits: torch.Tensor) -> StepResult:
        """See ``ShardStage``."""
        self.logits = logits
        return super().sample(plan, logits)


class Pipeline:
    """Stages of so many layers each, in this process.

    Args:
        directory: the checkpoint.
        split: layers of each stage; those of each part where a stage has several.
        slots: most sequences at once.
        max_tokens: longest context; 0: the model's.
        kv_tokens: KV room in all; 0: as much as that takes.
        dtype: to compute in.
        device: of all parts, as torch names it.
        adapters: directories of LoRA adapters, by name.

    Attributes:
        split: layers of each stage.
        stages: with their weights.
        capacity: of all of them together.
        vocabulary: the model's.
        adapters: names of those that are loaded.

    Raises:
        ModelFilesError: if the checkpoint cannot be served.
    """

    def __init__(
        self,
        directory: Path,
        split: Sequence[int | Sequence[int]],
        *,
        slots: int = 4,
        max_tokens: int = 0,
        kv_tokens: int = 0,
        dtype: str = "float32",
        device: str = "cpu",
        adapters: Mapping[str, Path] | None = None,
    ) -> None:
        profile = read_profile(directory, dtype)
        self.adapters = tuple(adapters or ())
        parts = [(layers,) if isinstance(layers, int) else tuple(layers) for layers in split]
        self.split = tuple(map(sum, parts))
        self.stages: list[ShardStage] = []
        self.capacity = Capacity(10**6, 10**9, 10**15)
        for index, (first, end) in enumerate(pairwise([0, *accumulate(self.split)])):
            assignment = ShardAssignment(
                stage_index=index,
                stage_count=len(split),
                first_layer=first,
                last_layer=end - 1,
                has_embed=index == 0,
                has_head=index == len(split) - 1,
                slots=slots,
                max_tokens=max_tokens,
                dtype=dtype,
                shards=[
                    DeviceShard(
                        device_id=device,
                        first_layer=start,
                        last_layer=stop - 1,
                        kv_bytes=kv_tokens
                        * sum(layer.kv_bytes_per_token for layer in profile.layers[start:stop]),
                    )
                    for start, stop in pairwise(accumulate(parts[index], initial=first))
                ],
            )
            command = PrepareShard(
                assignment=assignment,
                model_dir=str(directory),
                adapter_dirs=map(str, (adapters or {}).values()),
            )
            stage = load_stage(assignment, shard_specs(command), {}, lambda *_: None)
            self.stages.append(_ListeningStage(stage.parts, stage.capacity))
            self.capacity = self.capacity.at_most(stage.capacity)
        shard = self.stages[0].first
        self.vocabulary = Vocabulary(shard.config.vocab_size, shard.eos_ids)

    def spread(self, count: int) -> list[str]:
        """For each of so many prompts the model alone, as "", or one of the adapters, in turn."""
        names = ["", *self.adapters]
        return [names[index % len(names)] for index in range(count)]

    def loop(
        self,
        policy: StepPolicy | None = None,
        record: Record | None = None,
        execution: str = "continuous",
    ) -> EngineLoop:
        """An engine loop over the stages, with nothing in it yet."""
        hub: list[Loopback] = []
        members = []
        for stage in self.stages:
            transport = Loopback(hub) if len(self.stages) > 1 else None
            members.append(ShardMember(stage, transport, len(self.stages)))
            if transport is not None:
                transport.follow = members[-1].follow
        runner = _Recorder(members[0], self.stages[-1], record)
        loop = EngineLoop(
            runner,
            policy or FcfsStep(),
            self.capacity,
            self.vocabulary,
            adapters=self.adapters,
            execution=execution,
        )
        runner.newest = lambda: loop.flights[-1].shares
        return loop


class _Recorder:
    """Runs steps, and keeps the logits of what they sampled."""

    def __init__(self, member: ShardMember, last: ShardStage, record: Record | None) -> None:
        self._member = member
        self._last = last
        self._record = record
        self._prompt_tokens: dict[int, int] = {}
        self._places: deque[list[tuple[str, int]]] = deque()
        self.newest: Callable[[], Sequence[Share]] = tuple

    @property
    def depth(self) -> int:
        """See ``uellm_worker.engine.runner.Runner``."""
        return self._member.depth

    def submit(self, plan: StepPlan) -> None:
        """See ``uellm_worker.engine.runner.Runner``."""
        for admission in plan.admissions:
            self._prompt_tokens[admission.slot] = admission.prompt_tokens
        # The newest of the steps under way is this one.
        chunks = [(share.sequence.request_id, share.chunk) for share in self.newest()]
        self._places.append(
            [
                (request_id, chunk.start + chunk.count - self._prompt_tokens[chunk.slot])
                for request_id, chunk in chunks
                if chunk.sample
            ]
        )
        if self._record is not None:
            self._record.admissions += len(plan.admissions)
        self._member.submit(plan)

    def collect(self, *, patient: bool = True) -> StepResult | None:
        """See ``uellm_worker.engine.runner.Runner``."""
        result = self._member.collect(patient=patient)
        logits = getattr(self._last, "logits", None)
        places = self._places.popleft()
        if self._record is not None and logits is not None:
            for row, (request_id, position) in enumerate(places):
                self._record.add(request_id, position, logits[row])
        return result


def generate(
    loop: EngineLoop,
    prompts: Sequence[Sequence[int]],
    sampling: Callable[[int], Sampling],
    logged: Sequence[Sequence[int]] = (),
    adapters: Sequence[str] = (),
) -> list[list[int]]:
    """Run all prompts together; the answers by index, what was logged included.

    Args:
        loop: an empty one.
        prompts: token ids.
        sampling: of each prompt.
        logged: the beginning of each answer, from an earlier run.
        adapters: the LoRA adapter of each prompt, or "".

    Raises:
        UellmError: if the engine refuses a prompt, or stalls.
    """
    answers = [list(tokens) for tokens in logged or [()] * len(prompts)]
    for index, prompt in enumerate(prompts):
        loop.add(
            AddSequence(
                request_id=str(index),
                token_ids=[*prompt, *answers[index]],
                prompt_tokens=len(prompt),
                sampling=sampling(index),
                adapter=adapters[index] if adapters else "",
            )
        )
    while loop.busy:
        report = loop.step()
        if report is None:
            raise UellmError("the engine has sequences and nothing to do: a fault of the loop")
        for output in report.outputs:
            if output.HasField("failure"):
                raise UellmError(f"prompt {output.request_id}: {output.failure.message}")
            answers[int(output.request_id)] += output.token_ids
    return answers
