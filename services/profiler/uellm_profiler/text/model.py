"""The text model: from what is seen of a prompt to how long its answer is, in relation to others.

In units of a served one's own spread of log lengths, from its own mean. A linear score of the
hashed words and the cues, shared by all that are served or, for those with the most completions,
one of its own, is what boosted trees begin with and correct: lengths follow amounts that prompts
name, which a line says from few examples and trees from many. A second, smaller forest says how
far off that is. What was answered to the very same prompt before, by whatever model, is averaged
with it. Where a language model is asked (the predictor ``llm``), a line over what it says is added
to the score, and the trees look at it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from uellm.prediction.interface import State
from uellm_profiler.text import linear
from uellm_profiler.text.linear import Weights
from uellm_profiler.text.record import SAID, Seen
from uellm_profiler.text.rows import Key
from uellm_profiler.text.trees import Trees

MOST_OWN = 8
"""Served ones with a linear score of their own."""
_MOST_PROMPTS = 100_000
HEARD = 2 + SAID
"""Columns where a language model is asked; see ``heard_of``."""

Floats = npt.NDArray[np.float64]


def columns_of(cues: npt.NDArray[Any], scores: Floats, own: Floats, ranks: Sequence[int]) -> Floats:
    """What the trees look at, shape [rows, features].

    Args:
        cues: shape [rows, cues].
        scores: the shared linear scores, shape [rows, scores].
        own: the score of the served one's own, or the first shared one where it has none.
        ranks: which of those with an own score it is, -1: none.
    """
    which = np.equal.outer(np.asarray(ranks), np.arange(MOST_OWN))
    return np.column_stack((cues, scores, own, which)).astype(np.float64)


def heard_of(seen: Sequence[Seen], own: Floats) -> Floats:
    """What a language model says of prompts, shape [rows, ``HEARD``]; zeros where nothing.

    That it says something, the linear score beside which it does, and what.
    """
    heard = np.zeros((len(seen), HEARD))
    for row, each, score in zip(heard, seen, own, strict=True):
        if len(each.said):
            row[:] = (1.0, score, *each.said)
    return heard


def bucket_of(count: int) -> int:
    """By how many answers a prompt is known: 0, 1, 2-3, 4-7, more."""
    return min(count.bit_length(), BUCKETS - 1)


BUCKETS = 5


@dataclass(slots=True)
class TextModel:
    """See the module.

    Attributes:
        shared: linear weights, shape [scores, buckets + cues + 1].
        own: those of single served ones.
        own_keys: which.
        limits: least and largest relative length that was learnt from; scores are kept within.
        centre: trees of what is lacking to the score.
        spread: trees of the logarithm of its error.
        shrinkage: how many answers to a prompt what the text says counts as.
        factors: of the spread, by what is known of the prompt; see ``bucket_of``.
        heed: weights of the columns of ``heard_of``; none where no language model is asked.
        prompts: sum of relative lengths and their number, by fingerprint of the prompt.
    """

    shared: Weights
    own: Weights
    own_keys: Sequence[Key]
    limits: tuple[float, float]
    centre: Trees
    spread: Trees
    shrinkage: float
    factors: Floats
    heed: Floats = field(default_factory=lambda: np.zeros(0))
    prompts: dict[int, tuple[float, int]] = field(default_factory=dict)

    def by_text(self, seen: Sequence[Seen], keys: Sequence[Key]) -> tuple[Floats, Floats]:
        """Relative lengths and spreads, as far as the text alone says."""
        ids, cues = [each.ids for each in seen], np.stack([each.cues for each in seen])
        scores = linear.score(ids, cues, self.shared)
        ranks = [self.own_keys.index(key) if key in self.own_keys else -1 for key in keys]
        own = scores[:, 0].copy()
        for rank in {*ranks} - {-1}:
            rows = [i for i, each in enumerate(ranks) if each == rank]
            weights = self.own[rank : rank + 1]
            own[rows] = linear.score([ids[i] for i in rows], cues[rows], weights)[:, 0]
        own = np.clip(own, *self.limits)
        columns = columns_of(cues, scores, own, ranks)
        if len(self.heed):
            heard = heard_of(seen, own)
            columns = np.column_stack((columns, heard))
            own = np.clip(own + (heard * self.heed).sum(axis=1), *self.limits)
        return own + self.centre.predict(columns), np.exp(self.spread.predict(columns))

    def with_known(
        self, seen: Sequence[Seen], relative: Floats, spreads: Floats
    ) -> tuple[Floats, Floats]:
        """The same, with what was answered to the same prompts before."""
        known = [self.prompts.get(each.fingerprint, (0.0, 0)) for each in seen]
        totals, counts = np.array(known, dtype=np.float64).reshape(len(seen), 2).T
        factors = self.factors[[bucket_of(count) for _, count in known]]
        return (self.shrinkage * relative + totals) / (self.shrinkage + counts), spreads * factors

    def remember(self, fingerprint: int, relative: float) -> None:
        """Take how long an answer to a prompt was."""
        total, count = self.prompts.pop(fingerprint, (0.0, 0))
        self.prompts[fingerprint] = (total + relative, count + 1)
        if len(self.prompts) > _MOST_PROMPTS:
            del self.prompts[next(iter(self.prompts))]

    def state(self) -> State:
        """Arrays that ``of_state`` takes."""
        known = list(self.prompts.values())
        return {
            "model_shared": self.shared,
            "model_own": self.own,
            "model_own_keys": np.array(self.own_keys, dtype=np.str_).reshape(len(self.own_keys), 3),
            "model_limits": np.array(self.limits),
            **self.centre.state("model_centre"),
            **self.spread.state("model_spread"),
            "model_shrinkage": np.array(self.shrinkage),
            "model_factors": self.factors,
            "model_heed": self.heed,
            "model_prompts": np.array(list(self.prompts), dtype=np.uint64),
            "model_prompt_lengths": np.array([total for total, _ in known], dtype=np.float64),
            "model_prompt_counts": np.array([count for _, count in known], dtype=np.int64),
        }

    @classmethod
    def of_state(cls, state: Mapping[str, npt.NDArray[Any]]) -> Self:
        """The model of a state.

        Raises:
            KeyError, ValueError: if it is none.
        """
        state = dict(state)
        known = zip(
            state["model_prompt_lengths"].tolist(),
            state["model_prompt_counts"].tolist(),
            strict=True,
        )
        return cls(
            shared=state["model_shared"],
            own=state["model_own"],
            own_keys=[(str(m), str(a), str(r)) for m, a, r in state["model_own_keys"]],
            limits=(float(state["model_limits"][0]), float(state["model_limits"][1])),
            centre=Trees.of_state("model_centre", state),
            spread=Trees.of_state("model_spread", state),
            shrinkage=float(state["model_shrinkage"]),
            factors=state["model_factors"],
            heed=state["model_heed"],
            prompts=dict(zip(state["model_prompts"].tolist(), known, strict=True)),
        )
