"""Tunes a network to all examples, and says of each prompt what one says that did not learn it.

What a network says of a prompt that it was tuned to would be trusted too much by trees that are
fitted to it, so that each half of the prompts has a network of its own, tuned to the other half
(cross-fitting; Chernozhukov et al. 2018). Both begin alike, so that the mean of their weights is a
network, too, and a better one than either (Wortsman et al., "Model soups", 2022).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from math import log
from pathlib import Path
from zlib import crc32

import numpy as np
import numpy.typing as npt

from uellm.core.request import LEVELS
from uellm.learning.examples import Example
from uellm.learning.training import digest
from uellm.prediction.interface import State
from uellm_profiler.llm.network import MOST_HEADS, Base, LengthNetwork, fast_dtype
from uellm_profiler.llm.tuning import Sample, Schedule, Tuning
from uellm_profiler.text.record import SAID

LEAST_OWN = 500
"""Fewest examples for a head of one's own."""
_HALVES = 2
_LEAST_DEVIATION = 0.1
_TOLD = 20
"""How often the loss of a tuning is told."""

Progress = Callable[[str, int], None]
Said = npt.NDArray[np.float32]


def tune_halves(
    base: Base,
    rank: int,
    schedule: Schedule,
    examples: Sequence[Example],
    directory: Path,
    progress: Progress,
) -> tuple[State, Said]:
    """A network's tuned weights, and what is said of each example's prompt, ``[examples, SAID]``.

    One that was interrupted goes on from what it kept in the directory.
    """
    own = np.array([_half_of(example.prompt) for example in examples])
    samples, source = samples_of(examples), digest(examples)
    weights, said, learnt = [], np.zeros((len(examples), SAID), dtype=np.float32), 0
    for half in range(_HALVES):
        # Where all prompts are one, there is nothing to be kept apart.
        others = np.flatnonzero(own != half) if (own != half).any() else np.arange(len(own))
        network = LengthNetwork(base, rank, schedule.seed)
        known = [samples[i] for i in others]
        network.begin_at(_expected(known))
        tuning = Tuning(network, known, schedule, directory / f"half-{half}", source)

        told = f"tuning half {half + 1} of {_HALVES}"
        tuning.run(_teller(progress, told, learnt, schedule.epochs, tuning.steps // _TOLD))
        learnt += len(others)
        weights.append(network.cpu().tuned())
        rows = np.flatnonzero(own == half).tolist()
        prompts = {examples[i].prompt: 0 for i in rows}
        spoken = dict(zip(prompts, network.merged(fast_dtype()).say(list(prompts)), strict=True))
        for i in rows:
            said[i] = spoken[examples[i].prompt]
    # Half precision says as much, and is written often while it serves.
    mean = {name: np.mean([each[name] for each in weights], axis=0) for name in weights[0]}
    return {name: array.astype(np.float16) for name, array in mean.items()}, said


def forget(directory: Path) -> None:
    """Remove what an interrupted tuning would go on from."""
    for half in range(_HALVES):
        Tuning.forget(directory / f"half-{half}")


def samples_of(examples: Sequence[Example]) -> list[Sample]:
    """Log lengths in units of each served one's own: mean 0, standard deviation 1."""
    keys = [(example.model, example.regime) for example in examples]
    logs: dict[tuple[str, str], list[float]] = {}
    for key, example in zip(keys, examples, strict=True):
        logs.setdefault(key, []).append(log(max(example.output_tokens, 1)))
    scales = {
        key: (float(np.mean(v)), max(float(np.std(v)), _LEAST_DEVIATION)) for key, v in logs.items()
    }
    common = Counter(keys).most_common(MOST_HEADS - 1)
    heads = {key: place for place, (key, count) in enumerate(common, 1) if count >= LEAST_OWN}
    samples = []
    for key, example in zip(keys, examples, strict=True):
        mean, deviation = scales[key]
        target = (log(max(example.output_tokens, 1)) - mean) / deviation
        samples.append(Sample(example.prompt, target, example.censored, heads.get(key, 0)))
    return samples


def _teller(
    progress: Progress, what: str, before: int, epochs: int, steps: int
) -> Callable[[int, float], None]:
    """Tells of the loss once in so many steps, and of the examples at each."""
    losses: list[float] = []
    label = what

    def tell(done: int, loss: float) -> None:
        nonlocal label
        losses.append(loss)
        if len(losses) >= steps:
            label = f"{what}, loss {np.mean(losses):.3f}"
            losses.clear()
        progress(label, before + done // epochs)

    return tell


def _expected(samples: Sequence[Sample]) -> list[float]:
    whole = [sample.target for sample in samples if not sample.censored]
    quantiles: list[float] = np.quantile(whole or [0.0], LEVELS).tolist()
    return quantiles


def _half_of(prompt: str) -> int:
    return crc32(prompt.encode("utf-8", "replace")) % _HALVES
