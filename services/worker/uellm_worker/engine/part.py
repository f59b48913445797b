"""One device's layers of a stage: the weights, their KV cache, and the computing of a step."""

import math
from typing import Any

import torch

from uellm.core.errors import ModelFilesError
from uellm.models.profile import read_profile
from uellm.v1.topology_pb2 import ShardAssignment
from uellm_worker.engine.attention import LayerCache, SlotCache
from uellm_worker.engine.capacity import Capacity, fit, fit_hybrid, fit_pages
from uellm_worker.engine.device import Device, Stopwatch, on_host
from uellm_worker.engine.graphs import CudaRecorder, DecodeGraphs
from uellm_worker.engine.native import kernels
from uellm_worker.engine.packed import PackedStep
from uellm_worker.engine.plan import StepPlan
from uellm_worker.engine.shard import Shard, longest_context
from uellm_worker.engine.slot_memory import page_tokens
from uellm_worker.engine.tiles import HEAD_NUMBERS
from uellm_worker.engine.varlen import PAGE_TOKENS, kernel, usable

_CALL_NUMBERS = 40_000
"""Keys that a CPU reads in the time of one more call of attention."""


class Part:
    """Consecutive layers on one device.

    Args:
        shard: its layers.
        capacity: of its cache.
        device: where both are.

    Attributes:
        cache: keys and values of its layers.
        watch: times its steps.
        held_bytes: weights, cache and recurrent states.

    Raises:
        MemoryError: if they do not fit a simulated device.
    """

    def __init__(self, shard: Shard, capacity: Capacity, device: Device) -> None:
        self.shard = shard
        self.device = device
        self.watch = Stopwatch(device)
        self._token_bytes = token_bytes(shard)
        self._read_bytes = shard.total_bytes - _looked_up_bytes(shard)
        self._flops = _flops(shard) if device.flops_per_second else (0.0, 0.0)
        self._state_bytes = state_bytes(shard)
        cached = capacity.kv_tokens * self._token_bytes + capacity.slots * self._state_bytes
        self.held_bytes = shard.total_bytes + cached
        device.check_room(self.held_bytes, "weights and KV cache")
        attentions = shard.attentions
        place, dtype = shard.spec.device, shard.spec.dtype
        self._flash = kernel() if usable(place, dtype, shard.head_dim) else None
        self.cache = SlotCache(
            layers=len(attentions),
            # Recorded steps write what fills them up to a slot of their own.
            slots=capacity.cache_slots + (self._flash is not None),
            kv_heads=shard.kv_heads,
            max_tokens=capacity.max_tokens,
            head_dim=shard.head_dim,
            dtype=dtype,
            device=place,
            block_tokens=capacity.block_tokens,
        )
        self._graphs = self._recordings(capacity)
        found = kernels(place, dtype)
        self._kernels = found if shard.head_dim % HEAD_NUMBERS == 0 else None
        numbers = max(shard.kv_heads * shard.head_dim, 1)
        self._call_tokens = _CALL_NUMBERS // numbers if on_host(device.place) else None
        for index, module in enumerate(attentions):
            module.uellm = LayerCache(self.cache, index)
        for mixer in shard.mixers:
            mixer.bind(
                self.cache,
                [
                    torch.zeros(capacity.cache_slots, *shape, dtype=dtype, device=shard.spec.device)
                    for shape, dtype in shard.states
                ],
            )

    def _recordings(self, capacity: Capacity) -> DecodeGraphs | None:
        """Of decode steps, where these depend on nothing but tensors."""
        shard = self.shard
        softcap = getattr(shard.config, "attn_logit_softcapping", None)
        if self._flash is None or softcap or shard.mixers or shard.adapters is not None:
            return None
        return DecodeGraphs(
            self._compute_step,
            self._flash,
            scratch=capacity.cache_slots,
            most=capacity.slots,
            recorder=CudaRecorder(),
        )

    def compute(self, plan: StepPlan, activation: torch.Tensor | None) -> torch.Tensor:
        """Compute a step.

        Args:
            plan: what.
            activation: ``[T, hidden]`` of the part before, on this part's device; None where the
                embedding is.

        Returns:
            ``[T, hidden]``, or where the head is ``[n, vocabulary]`` of the rows that sample.
        """
        self.watch.start()
        self.cache.carry_out(plan.moves)
        device = self.shard.spec.device
        if self.shard.adapters is not None:
            self.shard.adapters.begin(plan)
        with torch.inference_mode():
            given = activation
            if given is None:
                given = torch.tensor(plan.token_ids, device=device)
            output = self._graphs.output(plan.chunks, given) if self._graphs else None
            if output is None:
                step = PackedStep(
                    plan.chunks, device, self._call_tokens, self._flash, self._kernels
                )
                output = self._compute_step(step, given)
        self._end(plan)
        return output

    def _compute_step(self, step: PackedStep, given: torch.Tensor) -> torch.Tensor:
        """Compute from token ids ``[T]`` or activations ``[T, hidden]``."""
        if self.shard.fused is not None:
            return self.shard.fused(step, self.cache, given)
        embedded = not self.shard.spec.has_embed
        inputs: dict[str, Any] = {
            "position_ids": step.positions[None],
            "inputs_embeds" if embedded else "input_ids": given[None],
            "use_cache": False,
        }
        self.cache.step = step
        output: torch.Tensor
        if self.shard.spec.has_head and len(step.samples):
            output = self.shard.model(**inputs, logits_to_keep=step.samples).logits[0]
        else:
            output = self.shard.decoder(**inputs).last_hidden_state[0]
        self.cache.step = None
        return output

    def _end(self, plan: StepPlan) -> None:
        """Take the time; on a simulated device, as much as it would take."""
        if self.device.paced:
            self.watch.wait_until(self._least_seconds(plan))
        self.watch.stop()

    def _least_seconds(self, plan: StepPlan) -> float:
        """What a step takes at least on a simulated device."""
        context = sum(chunk.start + chunk.count for chunk in plan.chunks)
        cached = context * self._token_bytes + len(plan.chunks) * self._state_bytes
        per_row, per_sample = self._flops
        flops = plan.rows * per_row + sum(chunk.sample for chunk in plan.chunks) * per_sample
        return self.device.least_seconds(self._read_bytes + cached, flops)


def token_bytes(shard: Shard) -> int:
    """KV cache of one token."""
    numbers = 2 * len(shard.attentions) * shard.kv_heads * shard.head_dim
    return numbers * shard.spec.dtype.itemsize


def state_bytes(shard: Shard) -> int:
    """Recurrent state of one sequence."""
    state = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shard.states)
    return state * len(shard.mixers)


def shard_capacity(shard: Shard, assignment: ShardAssignment, kv_bytes: int = 0) -> Capacity:
    """What fits the memory that was granted; see ``uellm_worker.engine.capacity.fit``.

    Args:
        shard: a part's layers.
        assignment: says how many slots of which length are wanted.
        kv_bytes: what the part was granted; 0: as much as that takes.

    Raises:
        ModelFilesError: if nothing fits, or the context changes the model's rotary embedding.
    """
    bytes_per_token, state = token_bytes(shard), state_bytes(shard)
    wanted = {
        "slots": max(assignment.slots, 1),
        "max_tokens": longest_context(shard.config, assignment.max_tokens),
        "kv_bytes": kv_bytes,
        "bytes_per_token": bytes_per_token,
        "block_tokens": page_tokens(shard.head_dim, shard.spec.dtype, shard.spec.device),
    }
    if shard.family.recurrence is None and usable(
        shard.spec.device, shard.spec.dtype, shard.head_dim
    ):
        del wanted["block_tokens"]
        capacity = fit_pages(**wanted, page_tokens=PAGE_TOKENS)
    elif shard.family.recurrence is None:
        capacity = fit(**wanted)
    else:
        capacity = fit_hybrid(**wanted, state_bytes=state)
    if capacity.max_tokens < 1:
        raise ModelFilesError(
            f"kv_bytes {kv_bytes} hold no token of {bytes_per_token} bytes"
            + (f" beside a state of {state} bytes" if state else "")
            + "; grant more memory, or split the model into more stages"
        )
    return capacity


def _looked_up_bytes(shard: Shard) -> int:
    """The embedding, of which a step reads a few rows; nothing where it is the head as well."""
    tied = shard.spec.has_head and bool(getattr(shard.config, "tie_word_embeddings", False))
    if tied or not shard.spec.has_embed:
        return 0
    return int(shard.config.vocab_size * shard.config.hidden_size * shard.spec.dtype.itemsize)


def _flops(shard: Shard) -> tuple[float, float]:
    """Arithmetic of a row in the layers, attention aside, and of a row that samples in the head."""
    spec, config = shard.spec, shard.config
    profile = read_profile(spec.model_dir, str(spec.dtype).removeprefix("torch."))
    layers = profile.layers[spec.first_layer : spec.last_layer + 1]
    head = 2.0 * config.vocab_size * config.hidden_size if spec.has_head else 0.0
    return sum(layer.flops_per_token for layer in layers), head
