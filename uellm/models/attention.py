"""How attention of one layer is shaped, by a model's config: its weights, and what it caches."""

from dataclasses import dataclass

from uellm.models.families import Number


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Attention of one layer.

    Attributes:
        weights: numbers of its projections.
        cached: numbers that are kept of each token. Of heads with keys and values of their own
            2·kv_heads·head_dim; of latent ones (MLA; DeepSeek-V2, arXiv 2405.04434, section 2.1)
            kv_lora_rank + qk_rope_head_dim: what keys and values of all heads are made of, and the
            key that carries the position.
    """

    weights: int
    cached: int


def read_attention(number: Number, kv_heads: int = 0) -> AttentionShape:
    """Attention as a config describes it.

    Args:
        number: reads a whole number of the config by its names.
        kv_heads: how many heads keys have; 0: as the config says, else as many as queries.
    """
    hidden = number("hidden_size", "n_embd")
    heads = number("num_attention_heads", "n_head")
    rank = number("kv_lora_rank", default=0)
    if rank:
        return _latent(number, hidden, heads, rank)
    kv_heads = kv_heads or number("num_key_value_heads", default=heads)
    head_dim = number("head_dim", default=hidden // heads)
    return AttentionShape(
        weights=hidden * head_dim * (2 * heads + 2 * kv_heads), cached=2 * kv_heads * head_dim
    )


def _latent(number: Number, hidden: int, heads: int, rank: int) -> AttentionShape:
    content, position = number("qk_nope_head_dim"), number("qk_rope_head_dim")
    value = number("v_head_dim")
    query_rank = number("q_lora_rank", default=0)
    queries = heads * (content + position)
    asked = query_rank * (hidden + queries) if query_rank else hidden * queries
    kept = hidden * (rank + position) + rank * heads * (content + value)
    return AttentionShape(weights=asked + kept + heads * value * hidden, cached=rank + position)
