"""The predictor from text: what it learns from prompts whose answers' lengths depend on them."""

import pickle
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uellm_profiler.text.cues import CUES
from uellm_profiler.text.predictor import TextPredictor
from uellm_profiler.text.record import see, unpacked
from uellm_profiler.text.trees import grow

from tests.support.prompts import NOUNS, medians, prompts, request
from uellm.core.errors import InvalidArgumentError
from uellm.core.request import LEVELS
from uellm.prediction.interface import (
    MOST_FEATURE_BYTES,
    CompletionFacts,
    PredictionRequest,
    Predictor,
    State,
)


def teach(
    predictor: Predictor,
    texts: Iterable[str],
    lengths: Iterable[float],
    model: str = "m",
    cap: float = float("inf"),
) -> None:
    """Predict each, and observe what came of it."""
    for text, length in zip(texts, lengths, strict=True):
        asked = request(text, model)
        [prediction] = predictor.predict_batch([asked])
        predictor.observe(
            CompletionFacts(
                model,
                "greedy",
                asked.prompt_tokens,
                int(min(length, cap)),
                length > cap,
                features=prediction.features,
            )
        )


def fit(predictor: Predictor) -> None:
    """Do what is due."""
    work = predictor.refit()
    assert work is not None
    predictor.adopt(pickle.loads(pickle.dumps(work))())  # noqa: S301 - as a process takes it
    assert predictor.refit() is None


def learnt(cap: float = float("inf")) -> TextPredictor:
    """A predictor that was fitted to 1,500 completions."""
    predictor = TextPredictor()
    teach(predictor, *prompts(1500, seed=0), cap=cap)
    fit(predictor)
    return predictor


@cache
def state_of_learnt() -> State:
    return learnt().state()


@pytest.fixture
def fitted() -> TextPredictor:
    predictor = TextPredictor()
    predictor.load(state_of_learnt())
    return predictor


def test_it_learns_what_prompts_ask_for(fitted: TextPredictor) -> None:
    texts, lengths = prompts(400, seed=1)
    error = np.abs(medians(fitted, texts) - lengths).mean()
    of_the_mean = np.abs(np.median(lengths) - lengths).mean()
    assert error < 0.3 * of_the_mean


def test_its_quantiles_cover_what_they_say(fitted: TextPredictor) -> None:
    texts, lengths = prompts(600, seed=2)
    asked = fitted.predict_batch([request(text) for text in texts])
    for level in (0.1, 0.5, 0.9):
        covered = np.mean(
            [y <= each.lengths.at(level) for y, each in zip(lengths, asked, strict=True)]
        )
        assert covered == pytest.approx(level, abs=0.07)


def test_before_it_is_fitted_the_prior_answers_and_features_are_kept() -> None:
    predictor = TextPredictor()
    texts, _ = prompts(60, seed=3)
    teach(predictor, texts, [40.0] * 60)
    [prediction] = predictor.predict_batch([request(texts[0])])
    assert prediction.lengths.at(0.5) == 40
    assert prediction.features
    assert predictor.refit() is None
    assert predictor.observations("m") == 60
    assert predictor.describe("m").at(0.5) == 40


def test_a_new_model_starts_from_what_others_taught(fitted: TextPredictor) -> None:
    texts, lengths = prompts(60, seed=4)
    first = medians(fitted, texts, "new")
    assert np.corrcoef(np.log(first), np.log(lengths))[0, 1] > 0.9
    # This one says twice as much, whatever is asked.
    teach(fitted, texts, 2 * lengths, "new")
    texts, lengths = prompts(200, seed=5)
    assert np.median(medians(fitted, texts, "new") / lengths) == pytest.approx(2, rel=0.2)
    assert np.median(medians(fitted, texts, "m") / lengths) == pytest.approx(1, rel=0.1)


def test_what_others_answered_to_the_same_prompt_counts() -> None:
    """Lengths that no words explain, but that models share."""
    rng = np.random.default_rng(6)
    words = ["".join(rng.choice(list("abcdefghij"), 8)) for _ in range(300)]
    own = dict(zip(words, rng.lognormal(5, 1, 300), strict=True))
    predictor = TextPredictor()
    for model in ("a", "b", "c"):
        teach(predictor, words, [own[w] * rng.lognormal(0, 0.1) for w in words], model)
    fit(predictor)
    predicted = medians(predictor, words, "new")
    assert np.corrcoef(np.log(predicted), np.log(list(own.values())))[0, 1] > 0.9
    # Widths shrink where a prompt is known.
    known, strange = predictor.predict_batch([request(words[0], "a"), request("zzzz yyyy", "a")])
    ratio = [p.lengths.at(0.9) / p.lengths.at(0.1) for p in (known, strange)]
    assert ratio[0] < 0.5 * ratio[1]


def test_cut_answers_are_not_taken_for_short_ones() -> None:
    texts, _ = prompts(300, seed=7)
    essays = [text for text in texts if "essay" in text]
    assert np.median(medians(learnt(cap=300), essays)) > 300


def test_predictions_in_a_batch_are_those_alone(fitted: TextPredictor) -> None:
    texts, _ = prompts(70, seed=8)
    asked = [request(text, model) for text, model in zip(texts, ["m", "new"] * 35, strict=True)]
    together = fitted.predict_batch(asked)
    assert together == [fitted.predict_batch([each])[0] for each in asked]


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=300), st.integers(1, 100_000), st.integers(0, 500))
def test_any_text_gets_ascending_quantiles_within_the_cap(
    text: str, prompt_tokens: int, max_tokens: int
) -> None:
    predictor = TextPredictor()
    predictor.load(state_of_learnt())
    asked = PredictionRequest("m", "greedy", prompt_tokens, max_tokens, text=text)
    [prediction] = predictor.predict_batch([asked])
    assert prediction.lengths.levels == LEVELS
    assert prediction.lengths.values[0] >= 1
    if max_tokens:
        assert prediction.lengths.values[-1] <= max_tokens
    assert len(prediction.features) <= MOST_FEATURE_BYTES


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=400) | st.text("abc .,\n", max_size=6000), st.integers(1, 100_000))
def test_a_record_holds_what_was_seen_and_no_more_than_it_may(text: str, tokens: int) -> None:
    seen = see(text, tokens)
    record = seen.packed()
    assert len(record) <= MOST_FEATURE_BYTES
    read = unpacked(record)
    assert read is not None
    assert read.fingerprint == seen.fingerprint
    np.testing.assert_array_equal(read.cues, seen.cues)
    np.testing.assert_array_equal(read.ids, seen.ids)
    assert unpacked(record[:-1]) is None or not seen.ids.size
    assert unpacked(b"\x63" + record[1:]) is None


@pytest.mark.parametrize(
    ("cue", "text", "other"),
    [
        ("yes_no", "Is it true that cats fly?", "Name a cat."),
        ("translate", "Translate this into German.", "Say this in other words."),
        ("code", "Write a Python function.", "Write a poem."),
        ("amount_words", "Tell it in 50 words.", "Tell it in words."),
        ("amount_sentences", "Answer in two sentences.", "Answer."),
        ("amount_items", "Name three famous rivers.", "Name a river."),
        ("amount_items", "Name seventeen rivers.", "Name eleven rivers."),
        ("amount_times", "Say it 40 times.", "Say it three times."),
        ("range", "Count from 90 down to 7.", "Count from 90 to 95."),
        ("range", "List the years 1990-1999.", "List the years."),
        ("quoted_characters", "Spell 'strawberry'.", "Spell 'fig'."),
        ("quoted_characters", 'Spell "fig".', "Don't spell it, it's the children's."),
        ("options", "Choose.\nA. one\nB. two", "Choose one or two."),
        ("rest_words", "Shorten this.\nIt is a long text.", "Shorten this."),
    ],
)
def test_cues(cue: str, text: str, other: str) -> None:
    place = CUES.index(cue)
    assert see(text, 5).cues[place] > see(other, 5).cues[place]


def test_amounts_are_learnt_from_few_and_said_of_others_too() -> None:
    """Answers as long as they are asked to be; the longest is longer than any that was seen."""
    rng = np.random.default_rng(13)

    def asked(amount: int) -> str:
        return f"Repeat the word {rng.choice(NOUNS)} {amount} times."

    amounts = rng.integers(2, 60, 64)
    predictor = TextPredictor()
    teach(predictor, [asked(amount) for amount in amounts], 3.0 * amounts)
    fit(predictor)
    others = np.array([5, 17, 33, 50])
    said = medians(predictor, [asked(amount) for amount in others])
    np.testing.assert_allclose(said, 3.0 * others, rtol=0.25)
    [beyond] = medians(predictor, [asked(90_000)])
    assert beyond < 3 * 3 * 60


def test_a_state_is_numbers_and_text_and_goes_on_alike(fitted: TextPredictor) -> None:
    assert all(array.dtype.kind in "biufU" for array in fitted.state().values())
    other = TextPredictor()
    other.load(fitted.state())
    texts, lengths = prompts(40, seed=9)
    for predictor in (fitted, other):
        teach(predictor, texts, lengths, "new")
    asked = [request(text, model) for text in texts for model in ("m", "new", "unknown")]
    assert other.predict_batch(asked) == fitted.predict_batch(asked)
    assert other.observations("new") == 40


def test_a_foreign_state_is_refused_and_changes_nothing(fitted: TextPredictor) -> None:
    before = medians(fitted, ["Write an essay."])
    for spoil in (lambda s: s.pop("model_centre_value"), lambda s: s.pop("rows_taught")):
        state = dict(fitted.state())
        change: Callable[[State], Any] = spoil
        change(state)
        with pytest.raises(InvalidArgumentError, match="state: not one of predictor 'text'"):
            fitted.load(state)
    np.testing.assert_array_equal(medians(fitted, ["Write an essay."]), before)


def test_what_came_during_a_fit_is_not_lost() -> None:
    """One that fits while it learns ends up as one that has learnt first and then saw the rest."""
    predictor = TextPredictor()
    texts, lengths = prompts(500, seed=10)
    teach(predictor, texts[:400], lengths[:400])
    work = predictor.refit()
    assert work is not None
    result = work()
    teach(predictor, texts[400:], lengths[400:])
    predictor.adopt(result)
    other = TextPredictor()
    teach(other, texts[:400], lengths[:400])
    other.adopt(result)
    teach(other, texts[400:], lengths[400:])
    asked = [request(text) for text in texts[:20]]
    assert predictor.predict_batch(asked) == other.predict_batch(asked)


def test_completions_are_kept_fairly_and_within_bounds() -> None:
    predictor = TextPredictor({"most_rows": 256, "first_fit": 300})
    texts, lengths = prompts(300, seed=11)
    teach(predictor, texts[:40], lengths[:40], "rare")
    teach(predictor, texts, lengths, "busy")
    state = predictor.state()
    kept = np.bincount(state["rows_key"])
    names = [str(key[0]) for key in state["rows_keys"]]
    assert dict(zip(names, kept.tolist(), strict=True)) == {"rare": 40, "busy": 216}


def test_of_what_is_served_no_more_nothing_is_kept_for_ever() -> None:
    predictor = TextPredictor({"most_rows": 256, "first_fit": 100_000})
    texts, lengths = prompts(256, seed=14)
    for withdrawn in ("one", "two", "three"):
        teach(predictor, texts[:80], lengths[:80], withdrawn)
    for _ in range(6):
        teach(predictor, texts, lengths, "served")
    other = TextPredictor({"most_rows": 256, "first_fit": 100_000})
    other.load(predictor.state())
    for _ in range(2):
        for each in (predictor, other):
            teach(each, texts, lengths, "served")
    state = other.state()
    assert [str(key[0]) for key in state["rows_keys"]] == ["served"]
    assert len(state["rows_key"]) == 256
    np.testing.assert_array_equal(state["rows_number"], predictor.state()["rows_number"])


def test_flattened_trees_predict_as_those_that_were_grown() -> None:
    from sklearn.ensemble import HistGradientBoostingRegressor  # noqa: PLC0415

    rng = np.random.default_rng(12)
    columns = rng.normal(size=(600, 5))
    target = columns[:, 0] * (columns[:, 1] > 0) + rng.normal(size=600) / 10
    grown: list[Any] = []
    fit_as_before = HistGradientBoostingRegressor.fit

    def fit_and_keep(self: Any, *data: Any) -> Any:
        grown.append(self)
        return fit_as_before(self, *data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HistGradientBoostingRegressor, "fit", fit_and_keep)
        trees = grow(columns, target, loss="absolute_error", trees=40)
    fresh = rng.normal(size=(700, 5))
    np.testing.assert_allclose(trees.predict(fresh), grown[0].predict(fresh), rtol=1e-9)


@pytest.mark.parametrize("cap", [40, 1])
def test_what_varies_in_nothing_can_be_learnt_from(cap: int) -> None:
    predictor = TextPredictor()
    teach(predictor, 300 * ["Say it again."], 300 * [40.0], cap=cap)
    fit(predictor)
    asked = request("Say it again.", max_tokens=100)
    [prediction] = predictor.predict_batch([asked])
    assert prediction.lengths.at(0.5) >= cap
    if cap == 40:
        assert 40 <= prediction.lengths.at(0.9) < 48
        assert prediction.lengths.at(0.5) == 40


def test_half_a_character_is_no_problem() -> None:
    assert unpacked(see("Say \ud800 again.", 5).packed()) is not None


def test_a_record_that_was_tampered_with_teaches_the_prior_alone(fitted: TextPredictor) -> None:
    record = see("Say it again.", 5).packed()
    before = fitted.state()["rows_taught"]
    for spoilt in (record[:-4] + b"\xff\xff\xff\xff", record[:9] + b"\xff\x7f" + record[11:], b"x"):
        fitted.observe(CompletionFacts("m", "greedy", 5, 10, features=spoilt))
    assert fitted.state()["rows_taught"] == before
    assert fitted.observations("m") == 1503


def test_settings_name_their_limits() -> None:
    with pytest.raises(InvalidArgumentError, match="most_rows: 1 must be at least 256"):
        TextPredictor({"most_rows": 1})
