"""From a predicted length to what it takes: KV cache and work (paper, section III-A)."""

import math

from uellm.core.model import ModelProfile
from uellm.core.request import QuantileFunction, ResourceProfile

BUCKETS = 10
"""Into which predictors of classes, the paper's and S³'s, put lengths."""


def kv_bytes(model: ModelProfile, prompt_tokens: int, output_tokens: float) -> int:
    """KV cache and recurrent state of one sequence at its peak, in bytes.

    The paper's ``4·b·l·h·(s+n)`` for b = 1, fp16 and as many KV heads as heads; with grouped
    queries ``2·l·kv_heads·head_dim·bytes·(s+n)``, with latent attention
    ``l·(kv_lora_rank + qk_rope_head_dim)·bytes·(s+n)`` (``uellm.models.attention``). All are in the
    model's bytes per token. Layers with a sliding window count in full, as engines hold them.
    """
    return round(model.kv_bytes_per_token * (prompt_tokens + output_tokens)) + model.state_bytes


def flops(model: ModelProfile, prompt_tokens: int, output_tokens: float) -> float:
    """Work of prefill and decode of one sequence, in floating-point operations.

    Every token but the last output passes all layers; the head is computed once per output token;
    attention at position t takes 4·hidden·t per layer (scores and values), as wide as the
    residual stream.
    """
    tokens = prompt_tokens + max(output_tokens - 1, 0.0)
    linear = tokens * sum(layer.flops_per_token for layer in model.layers)
    head = output_tokens * 2.0 * model.hidden_size * model.vocab_size
    attention = len(model.layers) * 2.0 * model.hidden_size * tokens * (tokens + 1)
    return linear + head + attention


def build_profile(
    model: ModelProfile,
    prompt_tokens: int,
    quantiles: QuantileFunction,
    max_tokens: int,
    predictor: str,
    version: str,
    fallback: bool = False,
    image_tokens: int = 0,
    image_flops: float = 0.0,
) -> ResourceProfile:
    """A request's profile from its predicted length, capped by ``max_tokens`` (0: no cap).

    Images count with their tokens, which are among the prompt's, and their encoder's work.
    """
    most = float(max_tokens) if max_tokens > 0 else float("inf")
    capped = quantiles.clipped(1.0, max(1.0, most))
    median = capped.at(0.5)
    return ResourceProfile(
        prompt_tokens=prompt_tokens,
        output_tokens=capped,
        kv_bytes=kv_bytes(model, prompt_tokens, median),
        flops=flops(model, prompt_tokens, median) + image_flops,
        predictor=predictor,
        predictor_version=version,
        fallback=fallback,
        image_tokens=image_tokens,
        bucket=bucket_of(median, max_tokens or model.max_tokens - prompt_tokens),
    )


def bucket_of(length: float, longest: int) -> int:
    """Which of ``BUCKETS`` equal parts of the longest answer a length is in, from 1."""
    return min(math.ceil(BUCKETS * length / max(longest, 1)), BUCKETS)
