import math

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from uellm_worker.engine.randomness import uniform  # noqa: E402
from uellm_worker.engine.sampling import Choice, choose  # noqa: E402

from uellm.v1.common_pb2 import Sampling  # noqa: E402

EOS = (1,)


def logits_of(seed: int, rows: int, size: int = 40) -> "torch.Tensor":
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def one(logits: "torch.Tensor", position: int = 0, **sampling: float) -> int:
    return choose(logits[None], [Choice(Sampling(**sampling), position)], EOS)[0][0]


def by_hand(logits: list[float], sampling: Sampling, position: int) -> int:
    """Rank, cut, invert: in plain Python."""
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])
    if sampling.top_k:
        ranked = ranked[: sampling.top_k]
    top = logits[ranked[0]]
    mass = [math.exp((logits[i] - top) / sampling.temperature) for i in ranked]
    nucleus = sampling.top_p if sampling.HasField("top_p") else 1.0
    kept, ahead = [], 0.0
    for value in mass:
        if ahead / sum(mass) >= nucleus:
            break
        kept.append(value)
        ahead += value
    target = uniform(sampling.seed, position) * sum(kept)
    for token, value in zip(ranked, kept, strict=False):
        target -= value
        if target < 0:
            return token
    raise AssertionError("unreachable")


def test_without_a_temperature_the_likeliest_token_is_taken() -> None:
    logits = logits_of(0, 1)[0]
    assert one(logits) == one(logits, temperature=0.0, top_p=0.5) == int(logits.argmax())
    assert one(logits, temperature=1.0, top_k=1) == int(logits.argmax())
    assert one(logits, temperature=1e-30) == int(logits.argmax())


@settings(deadline=None)
@given(
    st.integers(0, 1000),
    st.floats(0.1, 3),
    st.none() | st.floats(0.05, 1),
    st.none() | st.integers(0, 60),
    st.integers(0, 2**64 - 1),
    st.integers(0, 5000),
)
def test_draws_equal_those_made_by_hand(
    case: int, temperature: float, top_p: float | None, top_k: int | None, seed: int, position: int
) -> None:
    logits = logits_of(case, 1)
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    chosen, _ = choose(logits, [Choice(sampling, position)], EOS)
    assert chosen == [by_hand(logits[0].tolist(), sampling, position)]


@settings(deadline=None)
@given(st.integers(0, 1000), st.permutations(range(6)))
def test_a_draw_does_not_depend_on_the_batch(case: int, order: list[int]) -> None:
    logits = logits_of(case, 6)
    choices = [
        Choice(
            Sampling(
                temperature=(0.0, 0.7, 1.3)[i % 3],
                top_p=0.9 if i % 2 else None,
                min_tokens=3 * (i % 2),
                seed=i,
                logprobs=2 if i == 4 else None,
            ),
            position=i,
        )
        for i in range(6)
    ]
    alone = [choose(logits[i : i + 1], [choices[i]], EOS)[0][0] for i in range(6)]
    together, _ = choose(logits[order], [choices[i] for i in order], EOS)
    assert together == [alone[i] for i in order]


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    draws = 4000
    counts = [0, 0, 0]
    rows = logits.expand(draws, 3)
    for token in choose(
        rows, [Choice(Sampling(temperature=1.0, seed=8), i) for i in range(draws)], ()
    )[0]:
        counts[token] += 1
    for count, probability in zip(counts, torch.softmax(logits, 0).tolist(), strict=True):
        assert abs(count / draws - probability) < 4 * math.sqrt(0.25 / draws)


def test_an_answer_does_not_end_before_its_least_length_or_when_it_ignores_the_end() -> None:
    logits = torch.tensor([0.0, 9.0, 1.0])
    assert one(logits) == 1
    assert one(logits, position=2, min_tokens=3) == 2
    assert one(logits, position=3, min_tokens=3) == 1
    assert one(logits, position=99, ignore_eos=True) == 2
    assert one(logits, ignore_eos=True, temperature=1.0) != 1


def test_log_probabilities_are_the_models_own() -> None:
    logits = torch.tensor([0.0, 9.0, 1.0])
    choices = [
        Choice(Sampling(logprobs=2, ignore_eos=True, temperature=0.1), 0),
        Choice(Sampling(), 0),
        Choice(Sampling(logprobs=0), 0),
        Choice(Sampling(logprobs=99), 0),
    ]
    tokens, logprobs = choose(logits.expand(4, 3), choices, EOS)
    wanted = torch.log_softmax(logits, 0).tolist()
    first, none, bare, every = logprobs
    assert none is None
    assert first is not None
    assert bare is not None
    assert every is not None
    assert first.logprob == pytest.approx(wanted[tokens[0]])
    assert list(first.top_ids) == [1, 2]
    assert list(first.top_logprobs) == pytest.approx([wanted[1], wanted[2]])
    assert (len(bare.top_ids), len(every.top_ids)) == (0, 3)


def test_rows_that_are_not_finite_are_told_apart() -> None:
    logits = torch.tensor([[0.0, math.nan, 1.0], [0.0, 1.0, 2.0], [math.inf, 0.0, 0.0]])
    for temperature in (0.0, 1.0):
        choices = [Choice(Sampling(temperature=temperature, top_k=1, logprobs=1), 0)] * 3
        tokens, logprobs = choose(logits, choices, ())
        assert tokens == [-1, 2, -1]
        assert [entry is None for entry in logprobs] == [True, False, True]
    assert choose(logits, [Choice(Sampling(temperature=1.0), 0)] * 3, ())[0][::2] == [-1, -1]
