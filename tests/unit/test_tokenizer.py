"""Tokenizer, incremental decoding and stop strings against what decoding all at once gives."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from tests.support.models import ASSISTANT, BOS, CHAT_TEMPLATE, EOS, USER, write_tiny_model_files
from uellm.core.errors import InvalidArgumentError, ModelFilesError
from uellm.models.tokenizer import IncrementalDecoder, StopChecker, Tokenizer

PIECES = ["▁", "▁▁", "a", "▁the", "le", "né", "▁你", "好", ".", "▁<", "🙂", "<tool>"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tiny_model_files(tmp_path_factory.mktemp("byte-level")))


def save(directory: Path, tokenizer: tokenizers.Tokenizer) -> Tokenizer:
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    return Tokenizer(directory)


def sentencepiece(decoder: decoders.Decoder) -> tokenizers.Tokenizer:
    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(vocabulary)}, [], byte_fallback=True)
    )
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def word_pieces() -> tokenizers.Tokenizer:
    words = ["[UNK]", "the", "##re", "a", ".", ",", "##s", "'", "n't", "do", "\ufffd", "é"]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def byte_fallback(*, strip: bool) -> decoders.Decoder:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)


def stream(decoder: IncrementalDecoder, ids: Sequence[int], cuts: Sequence[int]) -> str:
    bounds = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    pushed = [decoder.push(ids[a:b]) for a, b in pairwise(bounds)]
    return "".join(pushed) + decoder.flush()


CUTS = st.lists(st.integers(0, 120), max_size=20)


@given(ids=st.lists(st.integers(0, 330), max_size=100), cuts=CUTS)
def test_byte_level_text_is_that_of_the_whole(
    byte_level: Tokenizer, ids: list[int], cuts: list[int]
) -> None:
    assert stream(byte_level.decoder(), ids, cuts) == byte_level._tokenizer.decode(ids)


@given(text=st.text(max_size=60), cuts=CUTS)
def test_byte_level_never_splits_a_character(
    byte_level: Tokenizer, text: str, cuts: list[int]
) -> None:
    ids = byte_level.encode(text, special=False)
    decoder = byte_level.decoder()
    pushed = [decoder.push([token]) for token in ids]
    assert "".join(pushed) + decoder.flush() == text
    assert all("\ufffd" not in part for part in pushed) or "\ufffd" in text


@pytest.fixture(scope="module", params=["strip", "no strip", "metaspace", "words", "none"])
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    plain = sentencepiece(decoders.Metaspace())
    if request.param == "none":
        description = json.loads(plain.to_str())
        description["decoder"] = None
        plain = tokenizers.Tokenizer.from_str(json.dumps(description))
    tokenizer = {
        "strip": sentencepiece(byte_fallback(strip=True)),
        "no strip": sentencepiece(byte_fallback(strip=False)),
        "words": word_pieces(),
    }.get(request.param, plain)
    return save(tmp_path_factory.mktemp("other"), tokenizer)


@given(data=st.data(), cuts=CUTS)
def test_other_tokenizers_text_is_that_of_the_whole(
    other: Tokenizer, data: st.DataObject, cuts: list[int]
) -> None:
    vocabulary = other._tokenizer.get_vocab()
    plain = [i for token, i in vocabulary.items() if not token.startswith("<0x")]
    character = st.sampled_from("é你🙂\n").map(
        lambda c: [vocabulary[f"<0x{byte:02X}>"] for byte in c.encode()]
    )
    word = st.sampled_from(plain).map(lambda i: [i])
    part = st.one_of(word, character) if "<0x00>" in vocabulary else word
    ids = [i for run in data.draw(st.lists(part, max_size=60)) for i in run]
    assert stream(other.decoder(), ids, cuts) == other._tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 268), max_size=80), cuts=CUTS)
def test_broken_byte_runs_read_the_same_however_they_are_cut(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], cuts: list[int]
) -> None:
    tokenizer = _byte_fallback(tmp_path_factory)
    assert stream(tokenizer.decoder(), ids, cuts) == tokenizer.decode(ids)


_cache: dict[str, Tokenizer] = {}


def _byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if "" not in _cache:
        directory = tmp_path_factory.mktemp("fallback")
        _cache[""] = save(directory, sentencepiece(byte_fallback(strip=True)))
    return _cache[""]


def test_a_window_waits_for_the_rest_of_a_character(tmp_path: Path) -> None:
    fuse = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = save(tmp_path, sentencepiece(fuse))
    ids = [tokenizer._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "🙂".encode()]
    decoder = tokenizer.decoder()
    assert [decoder.push([i]) for i in ids] == ["", "", "", "🙂"]
    decoder = tokenizer.decoder()
    endless = [decoder.push([ids[1]]) for _ in range(500)]
    assert "".join(endless) + decoder.flush() == "\ufffd" * 500


def test_an_answer_goes_on_from_a_prompt_that_ends_in_text(tmp_path: Path) -> None:
    for name, decoder in (("a", byte_fallback(strip=True)), ("b", decoders.Metaspace())):
        tokenizer = save(tmp_path / name, sentencepiece(decoder))
        the, eos = (tokenizer._tokenizer.token_to_id(token) for token in ("▁the", "</s>"))
        assert tokenizer.decoder().push([the, the]) == "the the"
        assert tokenizer.decoder([eos]).push([the, the]) == "the the"
        assert tokenizer.decoder([the]).push([the, the]) == " the the"
        assert tokenizer.decoder([the]).push([the, eos, the]) == " the the"


def test_text_and_chat_prompts_begin_once(byte_level: Tokenizer) -> None:
    bos = byte_level._tokenizer.token_to_id(BOS)
    assert byte_level.encode("the end", special=True)[0] == bos
    prompt = byte_level.render_chat([{"role": "user", "content": "hi <b> 'x'"}])
    assert prompt == f"{BOS}{USER}hi <b> 'x'{EOS}\n{ASSISTANT}"
    assert byte_level.encode(prompt, special=False).count(bos) == 1
    assert byte_level.eos_ids == {byte_level._tokenizer.token_to_id(EOS)}
    assert byte_level.has_chat_template


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "Expected"),
        ("{{ messages[0].content.foo.bar }}", "no attribute"),
        ("{{ 'x' * 1000000000 }}", "operator *"),
        ("{% for i in range(99999) %}{{ messages[0]['content'] }}{% endfor %}", "wrote more"),
        ("{% for i in range(999999999) %}{% endfor %}", "Range too big"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    ],
)
def test_a_template_that_fails_is_the_messages_fault(
    tmp_path: Path, template: str, part: str
) -> None:
    tokenizer = Tokenizer(write_tiny_model_files(tmp_path, chat_template=template))
    with pytest.raises(InvalidArgumentError, match="chat template") as caught:
        tokenizer.render_chat([{"role": "user", "content": "x" * 100}])
    assert part in caught.value.message
    assert caught.value.field == "chat.messages"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            "{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}",
            "user\n",
        ),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "<é>"}'),
        ("{% generation %}{{ 2 * 3 }}{% endgeneration %}", "6"),
        ("{{ strftime_now('%%') }}{{ tools is none }}", "%True"),
        ("{% for i in range(3) %}{% if i == 1 %}{% break %}{% endif %}{{ i }}{% endfor %}", "0"),
    ],
)
def test_templates_see_what_checkpoints_expect(tmp_path: Path, template: str, text: str) -> None:
    tokenizer = Tokenizer(write_tiny_model_files(tmp_path, chat_template=template))
    assert tokenizer.render_chat([{"role": "user", "content": "<é>"}]) == text


def test_the_template_file_wins_and_none_is_said(tmp_path: Path) -> None:
    write_tiny_model_files(tmp_path, chat_template="")
    with pytest.raises(InvalidArgumentError, match="no chat template"):
        Tokenizer(tmp_path).render_chat([])
    (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert Tokenizer(tmp_path).render_chat([]) == BOS + ASSISTANT


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFilesError, match=r"not a tokenizer\.json"):
        Tokenizer(tmp_path)


TEXT = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=6), max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(text=TEXT, stops=STOPS, cuts=CUTS)
def test_the_first_stop_ends_the_text(text: str, stops: list[str], cuts: list[int]) -> None:
    expected, expected_stop = first_stop(text, stops)
    checker = StopChecker(stops)
    sent, found = "", None
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for a, b in pairwise(bounds):
        safe, found = checker.push(text[a:b])
        sent += safe
        assert expected.startswith(sent)
        if found:
            break
        # No more is held back than may still become a stop string.
        held = text[len(sent) : b]
        assert any(stop.startswith(held) for stop in stops) or not held
    if found is None:
        sent += checker.flush()
    assert (sent, found) == (expected, expected_stop)
