"""What a client holds of an answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uellm.client.answers import Answer, GapError
from uellm.v1.inference_pb2 import GenerationEvent, Tokens


def run(first: int, last: int) -> GenerationEvent:
    text = "".join(f"<{i}>" for i in range(first, last))
    return GenerationEvent(tokens=Tokens(offset=first, ids=range(first, last), text=text))


def test_a_run_that_straddles_what_is_held_is_cut() -> None:
    answer = Answer()
    assert answer.take(run(0, 3)) == run(0, 3)
    assert answer.take(run(3, 5)) == run(3, 5)
    assert answer.take(run(3, 9)) == run(5, 9)
    assert answer.take(run(0, 12)) == run(9, 12)
    assert answer.take(run(0, 12)) is None


def test_a_gap_is_one() -> None:
    answer = Answer()
    answer.take(run(0, 3))
    with pytest.raises(GapError):
        answer.take(run(4, 5))


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=40))
def test_whatever_is_delivered_in_whatever_order_the_text_has_no_seam(
    runs: list[tuple[int, int]],
) -> None:
    answer, text = Answer(), ""
    for first, last in runs:
        try:
            news = answer.take(run(first, last))
        except GapError:
            continue
        text += news.tokens.text if news is not None else ""
    assert text == "".join(f"<{i}>" for i in range(answer.next_offset))
