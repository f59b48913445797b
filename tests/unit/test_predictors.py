"""Predictors by name, what they keep, and what is joined with completions."""

from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.predictors import FACTS, request
from uellm.core.errors import InvalidArgumentError
from uellm.prediction import registry
from uellm.prediction.interface import CompletionFacts, Predictor
from uellm.prediction.prior import Prior


@given(st.lists(FACTS, max_size=80), st.lists(FACTS, max_size=20), st.integers(1, 40))
def test_a_prior_that_was_kept_and_loaded_goes_on_alike(
    before: list[CompletionFacts], after: list[CompletionFacts], window: int
) -> None:
    settings = {"cell_window": window, "model_window": 2 * window}
    first = registry.predictor("prior", settings)
    for fact in before:
        first.observe(fact)
    second = registry.predictor("prior", settings)
    second.load(first.state())
    for fact in after:
        first.observe(fact)
        second.observe(fact)
    asked = [request(1 << i, model=model) for i in range(15) for model in ("m", "n")]
    assert second.predict_batch(asked) == first.predict_batch(asked)
    assert [second.observations(m) for m in "mn"] == [first.observations(m) for m in "mn"]


def test_state_is_numbers_and_text_only() -> None:
    predictor = Prior()
    predictor.observe(CompletionFacts("m", "greedy", 10, 20))
    assert all(array.dtype.kind in "biufU" for array in predictor.state().values())


def test_a_foreign_state_is_refused_and_changes_nothing() -> None:
    predictor = Prior()
    predictor.observe(CompletionFacts("m", "greedy", 10, 20))
    for state in ({}, {**predictor.state(), "models": np.array(["m", "n"])}):
        with pytest.raises(InvalidArgumentError, match="state: not one of predictor 'prior'"):
            predictor.load(state)
    assert predictor.observations("m") == 1


def offer(monkeypatch: pytest.MonkeyPatch, **offered: str) -> None:
    points = EntryPoints(EntryPoint(name, at, registry.GROUP) for name, at in offered.items())

    def found(**chosen: Any) -> EntryPoints:
        return points.select(**chosen)

    monkeypatch.setattr(registry, "entry_points", found)


class Offered(Prior):
    """A predictor as another package offers it."""

    name = "offered"

    def __init__(self, settings: dict[str, object]) -> None:
        super().__init__()
        self.settings = settings


def test_installed_packages_offer_predictors(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, offered=f"{__name__}:Offered")
    assert registry.predictors() == ["offered", "prior"]
    made: Predictor = registry.predictor("offered", {"window": 3})
    assert isinstance(made, Offered)
    assert made.settings == {"window": 3}


def test_what_is_not_known_is_answered_with_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, lacking="a_package_that_is_not_there:Predictor")
    with pytest.raises(InvalidArgumentError, match="no 'foo'; available: lacking, prior"):
        registry.predictor("foo")
    with pytest.raises(InvalidArgumentError, match="needs a_package_that_is_not_there"):
        registry.predictor("lacking")
    with pytest.raises(InvalidArgumentError, match="wind: no such setting; available: cell_window"):
        registry.predictor("prior", {"wind": 3})
