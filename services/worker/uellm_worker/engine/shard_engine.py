"""The engine that computes: a layer range of a model, stepping packed batches over a slot cache."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from uellm.core.errors import ModelFilesError
from uellm.v1.engine_pb2 import PrepareShard
from uellm.v1.topology_pb2 import ShardAssignment
from uellm_worker.engine.attention import LayerCache, PackedStep, SlotCache
from uellm_worker.engine.capacity import Capacity, Prepared, Vocabulary
from uellm_worker.engine.group import Group, advertised_host
from uellm_worker.engine.inbox import Inbox
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
from uellm_worker.engine.shard import DTYPES, Shard, load_shard, longest_context
from uellm_worker.engine.transport import ProcessGroupTransport, Transport, open_store
from uellm_worker.engine.weights import ShardSpec


class ShardStage:
    """One stage's part of every step.

    Args:
        shard: its layers.
        capacity: of its cache.
    """

    def __init__(self, shard: Shard, capacity: Capacity) -> None:
        self.shard = shard
        self.capacity = capacity
        self._eos_ids = sorted(shard.eos_ids)
        self._admissions: dict[int, Admission] = {}
        attentions = shard.attentions
        self._cache = SlotCache(
            layers=len(attentions),
            slots=capacity.slots,
            kv_heads=_kv_heads(shard.config),
            max_tokens=capacity.max_tokens,
            head_dim=shard.head_dim,
            dtype=shard.spec.dtype,
            device=shard.spec.device,
        )
        for index, module in enumerate(attentions):
            module.uellm = LayerCache(self._cache, index)

    def compute(self, plan: StepPlan, activation: torch.Tensor | None) -> torch.Tensor:
        """Compute a step.

        Args:
            plan: what.
            activation: ``[T, hidden]`` of the stage before; None where the embedding is.

        Returns:
            ``[T, hidden]``, or where the head is ``[n, vocabulary]`` of the rows that sample.
        """
        for admission in plan.admissions:
            self._admissions[admission.slot] = admission
            if admission.scrub:
                self._cache.scrub(admission.slot)
        device = self.shard.spec.device
        step = PackedStep(plan.chunks, device)
        inputs: dict[str, Any] = {"position_ids": step.positions[None], "use_cache": False}
        if activation is None:
            inputs["input_ids"] = torch.tensor([plan.token_ids], device=device)
        else:
            inputs["inputs_embeds"] = activation[None]
        self._cache.step = step
        with torch.inference_mode():
            if self.shard.spec.has_head and len(step.samples):
                output = self.shard.model(**inputs, logits_to_keep=step.samples).logits[0]
            else:
                output = self.shard.decoder(**inputs).last_hidden_state[0]
        self._cache.step = None
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
        if not self._stage.shard.spec.has_head:
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
        self._stage = ShardStage(shard, capacity)
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
        spec = self._stage.shard.spec
        transport = ProcessGroupTransport(
            group,
            inbox,
            self._host,
            store,
            device=spec.device,
            hidden_size=self._stage.shard.config.hidden_size,
            dtype=spec.dtype,
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


def shard_capacity(shard: Shard, assignment: ShardAssignment) -> Capacity:
    """How many slots of which length fit the memory that was granted; 0 bytes: as many as asked.

    Every slot has room for the longest context. Where not even one has, the context is shortened.

    Raises:
        ModelFilesError: if nothing fits, or the context changes the model's rotary embedding.
    """
    numbers_per_token = 2 * len(shard.attentions) * _kv_heads(shard.config) * shard.head_dim
    bytes_per_token = numbers_per_token * shard.spec.dtype.itemsize
    slots = max(assignment.slots, 1)
    max_tokens = longest_context(shard.config, assignment.max_tokens)
    if assignment.kv_bytes:
        room = assignment.kv_bytes // bytes_per_token
        slots = min(slots, max(room // max_tokens, 1))
        max_tokens = min(max_tokens, room)
    if max_tokens < 1:
        raise ModelFilesError(
            f"kv_bytes {assignment.kv_bytes} hold no token of {bytes_per_token} bytes; "
            "grant more memory, or split the model into more stages"
        )
    return Capacity(slots, max_tokens, slots * max_tokens)


def _kv_heads(config: Any) -> int:
    """Key heads per layer."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _device_name(device: torch.device) -> str:
    """See ``Prepared.device``."""
    if device.type != "cuda":
        return "cpu"
    return f"cuda:{torch.cuda.get_device_properties(device).uuid}"
