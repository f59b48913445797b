from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.predictors import FACTS, request
from uellm.core.model import LayerProfile, ModelProfile
from uellm.core.request import LEVELS, QuantileFunction
from uellm.prediction import prior
from uellm.prediction.interface import CompletionFacts, Predictor
from uellm.prediction.prior import Prior
from uellm.prediction.resources import bucket_of, build_profile, flops, kv_bytes


def completion(
    output_tokens: int, prompt_tokens: int = 100, *, censored: bool = False, model: str = "m"
) -> CompletionFacts:
    return CompletionFacts(model, "greedy", prompt_tokens, output_tokens, censored)


@given(st.lists(FACTS, max_size=60), st.integers(0, 20_000), st.integers(0, 500))
def test_whatever_was_seen_quantiles_ascend_within_the_cap(
    facts: list[CompletionFacts], prompt_tokens: int, max_tokens: int
) -> None:
    predictor: Predictor = Prior()
    for fact in facts:
        predictor.observe(fact)
    quantiles = predictor.predict(request(prompt_tokens, max_tokens))
    assert quantiles.levels == LEVELS
    assert list(quantiles.values) == sorted(quantiles.values)
    assert quantiles.values[0] >= 1
    if max_tokens:
        assert quantiles.values[-1] <= max_tokens


@given(st.lists(FACTS, max_size=60), st.integers(0, 20_000))
def test_the_same_completions_teach_the_same_whenever_it_was_asked(
    facts: list[CompletionFacts], prompt_tokens: int
) -> None:
    asked, silent = Prior(), Prior()
    for fact in facts:
        asked.observe(fact)
        asked.predict(request(prompt_tokens))
        silent.observe(fact)
    assert asked.predict(request(prompt_tokens)) == silent.predict(request(prompt_tokens))


def test_the_default_is_broad_and_as_documented() -> None:
    quantiles = Prior().predict(request())
    assert quantiles.at(0.1) == pytest.approx(32, rel=0.15)
    assert quantiles.at(0.5) == pytest.approx(150, rel=0.1)
    assert quantiles.at(0.9) == pytest.approx(698, rel=0.15)


@settings(max_examples=15, deadline=None)
@given(st.floats(20, 800), st.floats(0.2, 1.2), st.integers(0, 2**32 - 1))
def test_quantiles_cover_stationary_lengths(median: float, sigma: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    predictor = Prior()
    for length in rng.lognormal(np.log(median), sigma, 400):
        predictor.observe(completion(max(1, round(length))))
    quantiles = predictor.predict(request())
    future = np.maximum(1, np.round(rng.lognormal(np.log(median), sigma, 4000)))
    for level in (0.1, 0.5, 0.9):
        assert np.mean(future <= quantiles.at(level)) == pytest.approx(level, abs=0.12)


def test_it_follows_a_change() -> None:
    predictor = Prior()
    for length in [500] * 1000 + [20] * prior.CELL_WINDOW:
        predictor.observe(completion(length))
    assert predictor.predict(request()).at(0.8) == 20


def test_an_unseen_band_leans_on_its_model_and_an_unseen_model_on_the_default() -> None:
    predictor = Prior()
    for _ in range(200):
        predictor.observe(completion(40, prompt_tokens=100))
    assert predictor.predict(request(prompt_tokens=5000)).at(0.5) == 40
    assert predictor.predict(request(model="other")) == Prior().predict(request(model="other"))


def test_a_cell_outweighs_its_model_as_it_fills() -> None:
    predictor = Prior()
    for _ in range(300):
        predictor.observe(completion(400, prompt_tokens=100))
    for _ in range(60):
        predictor.observe(completion(10, prompt_tokens=5))
    assert predictor.predict(request(prompt_tokens=5)).at(0.5) == 10
    assert predictor.predict(request(prompt_tokens=100)).at(0.5) == 400


def test_a_censored_length_counts_as_at_least() -> None:
    predictor = Prior()
    for _ in range(100):
        predictor.observe(completion(30))
        predictor.observe(completion(16, censored=True))
    quantiles = predictor.predict(request())
    assert quantiles.at(0.3) == 30
    assert quantiles.at(0.5) == 30


def test_answers_that_are_always_cut_are_expected_to_reach_the_cap() -> None:
    predictor = Prior()
    for _ in range(100):
        predictor.observe(completion(16, censored=True))
    assert predictor.predict(request(max_tokens=16)).at(0.1) == 16
    assert predictor.predict(request()).at(0.5) > 16


def test_state_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prior, "MOST_CELLS", 4)
    monkeypatch.setattr(prior, "MOST_MODELS", 3)
    predictor = Prior()
    for i in range(20):
        predictor.observe(completion(7, model=f"m{i}"))
        predictor.predict(request(model=f"m{i}"))
    assert [predictor.observations(f"m{i}") for i in (0, 16, 17, 19)] == [0, 0, 1, 1]
    assert len(vars(predictor)["_cells"]) <= 4
    assert len(vars(predictor)["_answers"]) <= 4


def test_describe_pools_the_whole_model() -> None:
    predictor = Prior()
    for i in range(200):
        predictor.observe(completion(50, prompt_tokens=1 << (i % 12)))
    assert predictor.observations("m") == 200
    assert predictor.describe("m").at(0.5) == 50


# ---- resources ---------------------------------------------------------------------------------


def model(layers: int, kv_bytes_per_token: int, hidden: int = 4096) -> ModelProfile:
    layer = LayerProfile(0, kv_bytes_per_token, 2.0 * 12 * hidden * hidden)
    return ModelProfile(
        layers=(layer,) * layers,
        embed_bytes=0,
        head_bytes=0,
        tied=False,
        activation_bytes_per_token=0,
        max_tokens=4096,
        vocab_size=1000,
        hidden_size=hidden,
    )


@given(st.integers(1, 80), st.integers(1, 9000), st.integers(1, 4000), st.integers(1, 4000))
def test_kv_bytes_are_the_papers_for_fp16_multi_head_attention(
    layers: int, hidden: int, prompt: int, output: int
) -> None:
    # Keys and values, two bytes each, as wide as the residual stream.
    profile = model(layers, 2 * 2 * hidden)
    assert kv_bytes(profile, prompt, output) == 4 * 1 * layers * hidden * (prompt + output)


def test_kv_bytes_with_grouped_queries() -> None:
    layers, kv_heads, head_dim, dtype_bytes = 32, 8, 128, 2
    profile = model(layers, 2 * kv_heads * head_dim * dtype_bytes)
    expected = 2 * layers * kv_heads * head_dim * dtype_bytes * (100 + 50)
    assert kv_bytes(profile, 100, 50) == expected


def test_kv_bytes_of_latent_attention() -> None:
    """DeepSeek-V2: a 512 wide latent and a 64 wide key in each of 60 layers, 69,120 bytes a token.

    (128 heads with 192 numbers a key and 128 a value would take 71 times that.)
    """
    assert kv_bytes(model(60, (512 + 64) * 2), 900, 100) == 69_120_000


def test_a_recurrent_state_is_as_large_for_any_length() -> None:
    profile = replace(model(2, 10), layers=(LayerProfile(0, 10, 0.0), LayerProfile(0, 0, 0.0, 64)))
    assert kv_bytes(profile, 3, 4) == 10 * 7 + 64
    assert kv_bytes(profile, 300, 400) == 10 * 700 + 64


def test_flops_by_hand_for_two_tokens() -> None:
    profile = model(layers=3, kv_bytes_per_token=0, hidden=8)
    # One prompt token, two output tokens: the layers see two, the head two, attention 1 + 2.
    expected = 2 * 3 * (2 * 12 * 8 * 8) + 2 * (2 * 8 * 1000) + 3 * 4 * 8 * (1 + 2)
    assert flops(profile, 1, 2) == expected


def test_a_profile_is_capped_and_sized_at_its_median() -> None:
    profile = model(layers=2, kv_bytes_per_token=10)
    quantiles = QuantileFunction((0.1, 0.5, 0.9), (10, 100, 1000))
    built = build_profile(profile, 20, quantiles, 60, "p", "1", fallback=True)
    assert built.output_tokens.values == (10, 60, 60)
    assert built.kv_bytes == 2 * 10 * (20 + 60)
    assert built.flops == flops(profile, 20, 60)
    assert (built.predictor, built.predictor_version, built.fallback) == ("p", "1", True)
    assert built.bucket == 10


def test_a_bucket_is_a_tenth_of_the_longest_answer() -> None:
    assert [bucket_of(length, 100) for length in (1, 10, 10.5, 90, 91, 100, 120)] == [
        *(1, 1, 2, 9, 10, 10, 10)
    ]


def test_images_count_with_their_tokens_and_their_encoder() -> None:
    profile = model(layers=2, kv_bytes_per_token=10)
    quantiles = QuantileFunction((0.1, 0.5, 0.9), (10, 100, 1000))
    built = build_profile(profile, 600, quantiles, 0, "p", "1", image_tokens=576, image_flops=1e9)
    assert built.image_tokens == 576
    assert built.kv_bytes == 2 * 10 * (600 + 100)
    assert built.flops == flops(profile, 600, 100) + 1e9
