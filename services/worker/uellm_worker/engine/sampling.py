"""How the last stage chooses tokens: greedy, or from a number keyed by (seed, position)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from uellm.v1.common_pb2 import Sampling
from uellm.v1.inference_pb2 import TokenLogprobs
from uellm_worker.engine.randomness import uniform

_COLDEST = 1e-5
"""Lower temperatures are greedy: dividing by them would overflow."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One token to be chosen.

    Attributes:
        sampling: how.
        position: index in the answer, from 0.
    """

    sampling: Sampling
    position: int

    @property
    def greedy(self) -> bool:
        """The likeliest token is taken."""
        return self.sampling.temperature < _COLDEST or self.sampling.top_k == 1

    @property
    def eos_masked(self) -> bool:
        """The answer may not end here."""
        return self.sampling.ignore_eos or self.position < self.sampling.min_tokens


def choose(
    logits: torch.Tensor, choices: Sequence[Choice], eos_ids: Sequence[int]
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """Choose one token per row.

    Args:
        logits: ``[n, vocabulary]``.
        choices: one per row.
        eos_ids: ids that end an answer.

    Returns:
        The ids, -1 for rows whose logits are not finite; and what rows asked for of log
        probabilities, empty if none did. These are the model's own, before temperature and masks.
    """
    logits = logits.float()
    chosen = _likeliest(logits)
    banned = set(eos_ids)
    others = [
        row
        for row, choice in enumerate(choices)
        if not choice.greedy or (choice.eos_masked and chosen[row] in banned)
    ]
    if others:
        again = _choose_again(logits[others], [choices[row] for row in others], eos_ids)
        for row, token in zip(others, again, strict=True):
            chosen[row] = token
    if not any(choice.sampling.HasField("logprobs") for choice in choices):
        return chosen, []
    logprobs = [
        _logprobs(logits[i], chosen[i], choice.sampling.logprobs)
        if choice.sampling.HasField("logprobs") and chosen[i] >= 0
        else None
        for i, choice in enumerate(choices)
    ]
    return chosen, logprobs


def _likeliest(logits: torch.Tensor) -> list[int]:
    """The likeliest token of each row; -1 where that is not finite."""
    if logits.device.type == "cpu":
        # Ten times as fast as torch's; both take the first of equals, and what is not a number.
        rows = logits.numpy()
        likeliest = rows.argmax(-1)
        likeliest[~np.isfinite(rows[np.arange(len(rows)), likeliest])] = -1
        found: list[int] = likeliest.tolist()
        return found
    ids = logits.argmax(-1)
    best = logits.gather(-1, ids[:, None])[:, 0]
    chosen: list[int] = ids.masked_fill(~torch.isfinite(best), -1).tolist()
    return chosen


def _choose_again(
    logits: torch.Tensor, choices: Sequence[Choice], eos_ids: Sequence[int]
) -> list[int]:
    """Choose where the likeliest of all tokens will not do; changes ``logits``."""
    masked = [row for row, choice in enumerate(choices) if choice.eos_masked]
    if masked and eos_ids:
        rows = torch.tensor(masked, device=logits.device)
        columns = torch.tensor(list(eos_ids), device=logits.device)
        logits[rows[:, None], columns] = float("-inf")
    chosen = _likeliest(logits)
    sampled = [row for row, choice in enumerate(choices) if not choice.greedy and chosen[row] >= 0]
    if sampled:
        ids = _sample(logits[sampled], [choices[row] for row in sampled]).tolist()
        for row, token in zip(sampled, ids, strict=True):
            chosen[row] = token
    return chosen


def _sample(logits: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
    """Draw one token per row by inverting the cumulative distribution of the ranked tokens."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=logits.device, dtype=torch.float64)[:, None]

    size = logits.shape[-1]
    temperature = column([choice.sampling.temperature for choice in choices])
    top_k = column([float(choice.sampling.top_k or size) for choice in choices])
    top_p = column([c.sampling.top_p if c.sampling.HasField("top_p") else 1.0 for c in choices])
    number = column([uniform(c.sampling.seed, c.position) for c in choices])
    ranked, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    ranked = ranked.double() / temperature
    ranked[torch.arange(size, device=logits.device) >= top_k] = float("-inf")
    mass = torch.softmax(ranked, dim=-1)
    # A token stays while those ahead of it have less than the nucleus; the first always does.
    mass[mass.cumsum(dim=-1) - mass >= top_p] = 0.0
    cumulative = mass.cumsum(dim=-1)
    place = torch.searchsorted(cumulative, number * cumulative[:, -1:], right=True)
    last = (mass > 0).sum(dim=-1, keepdim=True) - 1
    return order.gather(-1, torch.minimum(place, last).clamp(min=0))[:, 0]


def _logprobs(logits: torch.Tensor, token: int, count: int) -> TokenLogprobs:
    """Log probabilities of the chosen token and of the likeliest ones."""
    logprobs = torch.log_softmax(logits, dim=-1)
    top = logprobs.topk(min(count, logprobs.shape[-1]))
    return TokenLogprobs(
        logprob=float(logprobs[token]),
        top_ids=top.indices.tolist(),
        top_logprobs=top.values.tolist(),
    )
