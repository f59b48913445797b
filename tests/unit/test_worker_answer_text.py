"""Text of an answer: the same for every cut into steps and every crash."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from uellm_worker.answer_text import AnswerText

from tests.support.models import tiny_tokenizer
from uellm.models.decoding import WindowDecoder
from uellm.models.tokenizer import Tokenizer

STOPS = ["the", " ", "e q", "aab", "é", "🙂", "世界", "\ufffd", "one two"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def words(tokenizer: Tokenizer) -> list[list[int]]:
    """Token runs that make words, characters of several bytes and halves of them."""
    texts = [
        "the quick",
        " brown",
        " one two",
        "aab",
        "naïve café",
        "你好",
        "世界",
        "🙂",
        "é",
        "a",
        "b",
    ]
    whole = [tokenizer.encode(text, special=False) for text in texts]
    return whole + [run[:-1] for run in whole if len(run) > 1] + [[0], [1]]


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first; of several there, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


class Holder:
    """What a leader does with one answer: logs what is released, and may die at any time."""

    def __init__(self, text: AnswerText, logged: list[int]) -> None:
        self.text = text
        for token in logged:
            text.push(token)
        text.take()
        self.unlogged: list[int] = []
        self.releasable = 0

    def push(self, token: int) -> None:
        self.unlogged.append(token)
        if self.text.push(token):
            self.releasable = len(self.unlogged)

    def log(self) -> tuple[list[int], str]:
        run, self.unlogged = self.unlogged[: self.releasable], self.unlogged[self.releasable :]
        self.releasable = 0
        return run, self.text.take()


@given(data=st.data())
def test_text_does_not_depend_on_cuts_or_crashes(
    data: st.DataObject, tokenizer: Tokenizer, words: list[list[int]]
) -> None:
    runs = data.draw(st.lists(st.sampled_from(words), min_size=1, max_size=12))
    answer = [token for run in runs for token in run]
    stops = data.draw(st.lists(st.sampled_from(STOPS), max_size=3))
    expected_text, expected_stop = first_stop(tokenizer.decode(answer), stops)

    logged: list[int] = []
    sent = ""
    holder = Holder(AnswerText(tokenizer.decoder(), stops), logged)
    position = 0
    while position < len(answer) and holder.text.stop is None:
        holder.push(answer[position])
        position += 1
        event = data.draw(st.sampled_from(["go on", "log", "log", "crash"]))
        if event == "log":
            run, text = holder.log()
            assert run or not text
            logged += run
            sent += text
        elif event == "crash":
            position = len(logged)
            holder = Holder(AnswerText(tokenizer.decoder(), stops), logged)
            assert holder.text.stop is None
    holder.text.flush()
    holder.releasable = len(holder.unlogged)
    run, text = holder.log()
    assert run or not text
    assert (sent + text, holder.text.stop) == (expected_text, expected_stop)
    assert logged + run == answer[: holder.text.tokens]


@given(data=st.data())
def test_stop_ends_with_the_token_that_completes_it(
    data: st.DataObject, tokenizer: Tokenizer, words: list[list[int]]
) -> None:
    runs = data.draw(st.lists(st.sampled_from(words), min_size=1, max_size=12))
    answer = [token for run in runs for token in run]
    text = AnswerText(tokenizer.decoder(), ["the"])
    for token in answer:
        assert text.stop is None
        text.push(token)
        if text.stop is not None:
            break
    if text.stop is not None:
        assert "the" in tokenizer.decode(answer[: text.tokens])
        assert "the" not in tokenizer.decode(answer[: text.tokens - 1])


def test_no_stop_before_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the the the", special=False)
    ends = [len(tokenizer.encode(prefix, special=False)) for prefix in ("the", "the the")]
    text = AnswerText(tokenizer.decoder(), ["the"], min_tokens=ends[0] + 1)
    for token in ids:
        text.push(token)
        if text.stop is not None:
            break
    assert text.stop == "the"
    assert text.tokens == ends[1]
    assert text.take() == "the "


def test_half_a_character_at_the_end_is_replaced_not_lost(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙃", special=False)
    text = AnswerText(tokenizer.decoder(), ["x"])
    assert not text.push(ids[0])
    assert text.take() == ""
    text.flush()
    assert text.take() == "\ufffd"


def test_a_window_decoder_is_held_too() -> None:
    pieces = {1: b"a", 2: "é".encode()[:1], 3: "é".encode()[1:]}

    def decode(ids: list[int]) -> str:
        return b"".join(pieces[i] for i in ids).decode(errors="replace")

    text = AnswerText(WindowDecoder(decode, ()))
    assert text.push(1)
    assert not text.push(2)
    assert text.push(3)
    assert text.take() == "aé"
