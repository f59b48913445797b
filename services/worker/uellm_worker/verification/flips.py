"""How often half precision chooses another token than float32 would have."""

from collections.abc import Sequence
from dataclasses import dataclass

from uellm.v1.common_pb2 import Sampling
from uellm_worker.verification.pipeline import Pipeline, generate
from uellm_worker.verification.reference import Reference


@dataclass(frozen=True, slots=True)
class Flips:
    """Tokens that rounding changed.

    Attributes:
        dtype: that the engine computed in.
        tokens: chosen in all, ends of answers included.
        flipped: those that float32 would not have chosen behind the same tokens.
    """

    dtype: str
    tokens: int
    flipped: int

    @property
    def rate(self) -> float:
        """Share of the tokens; 0 without any."""
        return self.flipped / max(self.tokens, 1)


def count_flips(
    pipeline: Pipeline, reference: Reference, prompts: Sequence[Sequence[int]], max_tokens: int
) -> Flips:
    """Answer greedily in half precision, and ask float32 about every token.

    Args:
        pipeline: computes in half precision.
        reference: the whole model in float32; it is fed the tokens that were chosen.
        prompts: token ids.
        max_tokens: most tokens of an answer.
    """
    adapters = pipeline.spread(len(prompts))
    answers = generate(
        pipeline.loop(), prompts, lambda _: Sampling(max_tokens=max_tokens), adapters=adapters
    )
    tokens = flipped = 0
    for prompt, answer, adapter in zip(prompts, answers, adapters, strict=True):
        with reference.adapted(adapter):
            wanted = reference.logits(prompt, answer).argmax(dim=-1).tolist()
        limit = min(max_tokens, pipeline.capacity.max_tokens - len(prompt))
        tokens += min(len(answer) + 1, limit)
        flipped += sum(ours != theirs for ours, theirs in zip(answer, wanted, strict=False))
        # An answer that is short of its limit ended by a token of its own.
        flipped += len(answer) < limit and wanted[len(answer)] not in reference.eos_ids
    dtype = str(pipeline.stages[0].first.spec.dtype).removeprefix("torch.")
    return Flips(dtype, tokens, flipped)
