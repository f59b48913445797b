from hypothesis import given
from hypothesis import strategies as st
from uellm_worker.engine.randomness import RESERVED_IDS, instant_token, uniform, word

SEEDS = st.integers(0, 2**64 - 1)
POSITIONS = st.integers(0, 2**31)


@given(SEEDS, POSITIONS)
def test_uniform_lies_in_the_unit_interval(seed: int, position: int) -> None:
    assert 0.0 <= uniform(seed, position) < 1.0


@given(SEEDS, POSITIONS, st.integers(RESERVED_IDS + 1, 300_000))
def test_instant_tokens_are_in_the_vocabulary_and_not_reserved(
    seed: int, position: int, vocab_size: int
) -> None:
    assert RESERVED_IDS <= instant_token(seed, position, vocab_size) < vocab_size


def test_instant_tokens_of_a_tiny_vocabulary() -> None:
    assert {instant_token(1, position, 2) for position in range(50)} == {0, 1}


def test_the_function_never_changes() -> None:
    """Answers that were begun by an older release are continued by a newer one."""
    assert [
        word(seed, position) for seed, position in ((0, 0), (0, 1), (1, 0), (2**64 - 1, 7))
    ] == [
        12035550249420947055,
        12935080325729570654,
        6791897765849424158,
        13352828336997090855,
    ]


def test_uniform_is_uniform_over_seeds_and_positions() -> None:
    for values in (
        [uniform(0, position) for position in range(20_000)],
        [uniform(seed, 0) for seed in range(20_000)],
        [uniform(seed, seed % 7) for seed in range(20_000)],
    ):
        counts = [0] * 20
        for value in values:
            counts[int(value * 20)] += 1
        chi_square = sum((count - 1000) ** 2 / 1000 for count in counts)
        assert chi_square < 50  # 19 degrees of freedom: p < 0.0002
