"""The engine that computes: a layer range of a model, stepping packed batches over a slot cache."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed import TCPStore

from uellm.core.errors import ModelFilesError
from uellm.v1.engine_pb2 import PrepareShard
from uellm_worker.engine.capacity import Capacity, Prepared, Vocabulary
from uellm_worker.engine.group import Group, advertised_host
from uellm_worker.engine.inbox import Inbox
from uellm_worker.engine.part import Part, shard_capacity
from uellm_worker.engine.plan import (
    Admission,
    StepPlan,
    StepResult,
    decode_plan,
    decode_result,
    encode_plan,
    encode_result,
)
from uellm_worker.engine.runner import Progress
from uellm_worker.engine.sampling import Choice, choose
from uellm_worker.engine.shard import DTYPES, Shard, load_shard
from uellm_worker.engine.transport import ProcessGroupTransport, Transport, open_store
from uellm_worker.engine.weights import ShardSpec


class ShardStage:
    """One worker's part of every step: parts on one or several devices, chained.

    Args:
        parts: in layer order; each has room for ``capacity``.
        capacity: of the caches.
    """

    def __init__(self, parts: Sequence[Part], capacity: Capacity) -> None:
        self.parts = tuple(parts)
        self.capacity = capacity
        self._eos_ids = sorted(self.last.eos_ids)
        self._admissions: dict[int, Admission] = {}

    @property
    def first(self) -> Shard:
        """The layers that activations come in at."""
        return self.parts[0].shard

    @property
    def last(self) -> Shard:
        """The layers that activations, or logits, go out at."""
        return self.parts[-1].shard

    def compute(self, plan: StepPlan, activation: torch.Tensor | None) -> torch.Tensor:
        """Compute a step.

        Args:
            plan: what.
            activation: ``[T, hidden]`` of the stage before, on the first part's device; None where
                the embedding is.

        Returns:
            ``[T, hidden]``, or where the head is ``[n, vocabulary]`` of the rows that sample, on
            the last part's device.
        """
        for admission in plan.admissions:
            self._admissions[admission.slot] = admission
        first, *others = self.parts
        output = first.compute(plan, activation)
        for part in others:
            output = part.compute(plan, output.to(part.shard.spec.device, non_blocking=True))
        return output

    def sample(self, plan: StepPlan, logits: torch.Tensor) -> StepResult:
        """Choose the tokens of a step; on the last stage."""
        choices = []
        for chunk in plan.chunks:
            if chunk.sample:
                admission = self._admissions[chunk.slot]
                position = chunk.start + chunk.count - admission.prompt_tokens
                choices.append(Choice(admission.sampling, position))
        if not choices:
            return StepResult(())
        with torch.inference_mode():
            token_ids, logprobs = choose(logits, choices, self._eos_ids)
        return StepResult(token_ids, logprobs)


class ShardMember:
    """A stage among its peers.

    Args:
        stage: computes.
        transport: to the neighbours; None for a replica of one stage.
    """

    def __init__(self, stage: ShardStage, transport: Transport | None) -> None:
        self._stage = stage
        self._transport = transport

    def run(self, plan: StepPlan) -> StepResult:
        """See ``uellm_worker.engine.runner.Runner``."""
        started = time.perf_counter()
        output = self._stage.compute(plan, None)
        if self._transport is None:
            result = self._stage.sample(plan, output)
            return replace(result, seconds=(time.perf_counter() - started,))
        seconds = (time.perf_counter() - started,)
        self._transport.send_step(encode_plan(replace(plan, seconds=seconds)), output)
        return decode_result(self._transport.wait_result())

    def follow(self, meta: bytes) -> None:
        """See ``uellm_worker.engine.runner.Member``."""
        if self._transport is None:
            raise RuntimeError("a replica of one stage has nobody to follow")
        plan, inline = decode_plan(meta)
        activation = self._transport.receive_activation(plan.rows, inline)
        started = time.perf_counter()
        output = self._stage.compute(plan, activation)
        if not self._stage.last.spec.has_head:
            seconds = (*plan.seconds, time.perf_counter() - started)
            self._transport.send_step(encode_plan(replace(plan, seconds=seconds)), output)
            return
        result = self._stage.sample(plan, output)
        seconds = (*plan.seconds, time.perf_counter() - started)
        self._transport.send_result(encode_result(replace(result, seconds=seconds)))

    def close(self) -> None:
        """See ``uellm_worker.engine.runner.Member``."""
        if self._transport is not None:
            self._transport.close()


class ShardEngine:
    """The shard engine in a child process: holds at most one stage."""

    def __init__(self) -> None:
        self._stage: ShardStage | None = None
        self._shard: Shard | None = None
        self._host = ""
        self._store: TCPStore | None = None

    def prepare(self, command: PrepareShard, progress: Progress) -> Prepared:
        """See ``uellm_worker.engine.runner.Engine``."""
        if command.threads:
            torch.set_num_threads(command.threads)
        self._host = advertised_host(command)
        spec = shard_spec(command)
        earlier, self._shard, self._stage = self._shard, None, None
        self._shard = shard = load_shard(spec, earlier, progress)
        capacity = shard_capacity(shard, command.assignment)
        self._stage = ShardStage([Part(shard, capacity)], capacity)
        return Prepared(
            capacity=capacity,
            vocabulary=Vocabulary(shard.config.vocab_size, shard.eos_ids),
            device=_device_name(spec.device),
            kept_bytes=shard.kept_bytes,
            total_bytes=shard.total_bytes,
        )

    def offer(self, bind_host: str) -> str:
        """The port of a store for forming the process group."""
        self._store = open_store(bind_host)
        return str(self._store.port)

    def join(self, group: Group | None, inbox: Inbox) -> ShardMember:
        """See ``uellm_worker.engine.runner.Engine``."""
        if self._stage is None:
            raise RuntimeError("no stage is loaded")
        if group is None:
            return ShardMember(self._stage, None)
        store, self._store = self._store, None
        first = self._stage.first
        transport = ProcessGroupTransport(
            group,
            inbox,
            self._host,
            store,
            device=first.spec.device,
            hidden_size=first.config.hidden_size,
            dtype=first.spec.dtype,
        )
        return ShardMember(self._stage, transport)


def shard_spec(command: PrepareShard) -> ShardSpec:
    """What an assignment asks for.

    Raises:
        ModelFilesError: if the dtype is unknown.
    """
    assignment = command.assignment
    dtype = assignment.dtype or "float32"
    if dtype not in DTYPES:
        raise ModelFilesError(f"dtype {dtype!r}: one of {', '.join(DTYPES)}")
    kind, _, index = next(iter(assignment.device_ids), "cpu").rpartition("/")[2].partition(":")
    device = torch.device("cuda", int(index or 0)) if kind == "cuda" else torch.device("cpu")
    return ShardSpec(
        model_dir=Path(command.model_dir),
        digest=assignment.model.digest,
        dtype=DTYPES[dtype],
        device=device,
        first_layer=assignment.first_layer,
        last_layer=assignment.last_layer,
        has_embed=assignment.has_embed,
        has_head=assignment.has_head,
    )


def _device_name(device: torch.device) -> str:
    """See ``Prepared.device``."""
    if device.type != "cuda":
        return "cpu"
    return f"cuda:{torch.cuda.get_device_properties(device).uuid}"
