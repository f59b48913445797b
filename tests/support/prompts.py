"""Prompts whose words tell how long their answers are."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from uellm.prediction.interface import (
    PredictionRequest,
    Predictor,
)

TASKS = {
    "Is it true that {} {}? Answer yes or no.": 4.0,
    "Translate the following into French: the {} {}.": 15.0,
    "Give me a list of five {} for a {}.": 60.0,
    "Describe the {} of a {} in detail.": 180.0,
    "Write an essay about {} and {}.": 500.0,
}


NOUNS = ("house", "river", "teacher", "engine", "winter", "market", "song", "window", "dog", "law")


def prompts(count: int, seed: int) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Prompts, and lengths of answers that depend on what they ask for."""
    rng = np.random.default_rng(seed)
    tasks = rng.integers(len(TASKS), size=count)
    names = list(TASKS)
    texts = [names[task].format(*rng.choice(NOUNS, 2, replace=False)) for task in tasks]
    medians = np.array(list(TASKS.values()))[tasks]
    return texts, np.maximum(np.round(medians * rng.lognormal(0, 0.2, count)), 1)


def request(text: str, model: str = "m", max_tokens: int = 0) -> PredictionRequest:
    return PredictionRequest(model, "greedy", max(len(text) // 4, 1), max_tokens, text=text)


def medians(predictor: Predictor, texts: Iterable[str], model: str = "m") -> Any:
    asked = [request(text, model) for text in texts]
    return np.array([each.lengths.at(0.5) for each in predictor.predict_batch(asked)])
