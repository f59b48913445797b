"""Falcon's attention for packed steps: transformers' own knows no attention interface."""

from typing import Any

import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

from uellm_worker.engine.attention import attention


class PackedFalconAttention(nn.Module):
    """Attention with the weights of transformers' ``FalconAttention``.

    The three layouts of its fused projection are one: for each key head its queries, its key and
    its value. There is one key head (multi-query), one for some queries (the new decoder
    architecture), or one for each.

    Args:
        module: whose weights.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.query_key_value = module.query_key_value
        self.dense = module.dense
        self.head_dim = module.head_dim
        grouped = module.new_decoder_architecture or not module.multi_query
        self._kv_heads = module.num_kv_heads if grouped else 1

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """``[1, T, hidden]`` to the same, and no weights."""
        del kwargs
        rows = hidden_states.shape[1]
        fused = self.query_key_value(hidden_states).view(rows, self._kv_heads, -1, self.head_dim)
        query = fused[:, :, :-2].reshape(1, rows, -1, self.head_dim).transpose(1, 2)
        key, value = (fused[None, :, :, part].transpose(1, 2) for part in (-2, -1))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attended, _ = attention(self, query, key, value, None)
        return self.dense(attended.reshape(1, rows, -1)), None
