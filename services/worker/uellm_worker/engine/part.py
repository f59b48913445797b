"""One device's layers of a stage: the weights, their KV cache, and the computing of a step."""

from typing import Any

import torch

from uellm.core.errors import ModelFilesError
from uellm.v1.topology_pb2 import ShardAssignment
from uellm_worker.engine.attention import LayerCache, PackedStep, SlotCache
from uellm_worker.engine.capacity import Capacity, fit
from uellm_worker.engine.plan import Release, StepPlan
from uellm_worker.engine.shard import Shard, longest_context
from uellm_worker.engine.slot_memory import page_tokens


class Part:
    """Consecutive layers on one device.

    Args:
        shard: its layers.
        capacity: of its cache.

    Attributes:
        cache: keys and values of its layers.
    """

    def __init__(self, shard: Shard, capacity: Capacity) -> None:
        self.shard = shard
        attentions = shard.attentions
        self.cache = SlotCache(
            layers=len(attentions),
            slots=capacity.cache_slots,
            kv_heads=_kv_heads(shard.config),
            max_tokens=capacity.max_tokens,
            head_dim=shard.head_dim,
            dtype=shard.spec.dtype,
            device=shard.spec.device,
            block_tokens=capacity.block_tokens,
        )
        for index, module in enumerate(attentions):
            module.uellm = LayerCache(self.cache, index)

    def compute(self, plan: StepPlan, activation: torch.Tensor | None) -> torch.Tensor:
        """Compute a step.

        Args:
            plan: what.
            activation: ``[T, hidden]`` of the part before, on this part's device; None where the
                embedding is.

        Returns:
            ``[T, hidden]``, or where the head is ``[n, vocabulary]`` of the rows that sample.
        """
        self.cache.carry_out(plan.moves)
        self.cache.carry_out([Release(a.slot, 0) for a in plan.admissions if a.scrub])
        device = self.shard.spec.device
        with torch.inference_mode():
            step = PackedStep(plan.chunks, device)
            given = activation
            if given is None:
                given = torch.tensor(plan.token_ids, device=device)
            if self.shard.fused is not None:
                return self.shard.fused(step, self.cache, given)
            return self._compute_model(step, given, embedded=activation is not None)

    def _compute_model(self, step: PackedStep, given: torch.Tensor, embedded: bool) -> torch.Tensor:
        """Compute a step through the model's own code."""
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


def shard_capacity(shard: Shard, assignment: ShardAssignment) -> Capacity:
    """What fits the memory that was granted; see ``uellm_worker.engine.capacity.fit``.

    Raises:
        ModelFilesError: if nothing fits, or the context changes the model's rotary embedding.
    """
    spec = shard.spec
    numbers_per_token = 2 * len(shard.attentions) * _kv_heads(shard.config) * shard.head_dim
    bytes_per_token = numbers_per_token * spec.dtype.itemsize
    capacity = fit(
        slots=max(assignment.slots, 1),
        max_tokens=longest_context(shard.config, assignment.max_tokens),
        kv_bytes=assignment.kv_bytes,
        bytes_per_token=bytes_per_token,
        block_tokens=page_tokens(shard.head_dim, spec.dtype, spec.device),
    )
    if capacity.max_tokens < 1:
        raise ModelFilesError(
            f"kv_bytes {assignment.kv_bytes} hold no token of {bytes_per_token} bytes; "
            "grant more memory, or split the model into more stages"
        )
    return capacity


def _kv_heads(config: Any) -> int:
    """Key heads per layer."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
