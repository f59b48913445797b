"""An answer is whole and in order, whatever order, loss and repetition its frames come with."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from uellm_gateway.answer import Answer
from uellm_gateway.resume import tokens_from

from tests.support.models import tiny_tokenizer
from uellm.models.tokenizer import Tokenizer
from uellm.v1.common_pb2 import Promise, Usage
from uellm.v1.inference_pb2 import Finished, TokenLogprobs, Tokens

LENGTHS = st.lists(st.integers(1, 4), min_size=1, max_size=8)


def log_of(lengths: list[int]) -> list[Tokens]:
    chunks, offset = [], 0
    for length in lengths:
        ids = range(offset, offset + length)
        logprobs = [TokenLogprobs(logprob=-i) for i in ids]
        chunks.append(Tokens(offset=offset, ids=ids, text=f"<{offset}>", logprobs=logprobs))
        offset += length
    return chunks


@given(lengths=LENGTHS, data=st.data())
def test_frames_in_any_order_give_each_token_once(lengths: list[int], data: st.DataObject) -> None:
    log = log_of(lengths)
    total = sum(lengths)
    frames = data.draw(st.lists(st.sampled_from(log), max_size=20))
    answer = Answer("r")
    events = []
    for frame in frames:
        if not answer.add_tokens(1, frame):
            # As the watcher does: from the log, then on.
            for chunk in log:
                assert answer.add_tokens(1, chunk)
        if data.draw(st.booleans()):
            events += answer.take()
    end = Finished(usage=Usage(output_tokens=total))
    if answer.next_offset < total:
        assert not answer.add_finished(end)
        for chunk in log:
            assert answer.add_tokens(1, chunk)
    assert answer.add_finished(end)
    assert answer.add_finished(end)
    events += answer.take()
    runs = [event.tokens for event in events if event.HasField("tokens")]
    assert [i for run in runs for i in run.ids] == list(range(total))
    assert [-p.logprob for run in runs for p in run.logprobs] == list(range(total))
    assert "".join(run.text for run in runs) == "".join(chunk.text for chunk in log)
    assert [run.offset for run in runs] == [run.ids[0] for run in runs]
    assert [event.HasField("finished") for event in events].count(True) == 1
    assert events[-1].HasField("finished")
    assert log == log_of(lengths)


def test_replaced_holders_and_old_promises_are_not_heard() -> None:
    answer = Answer("r", choice=2)
    assert answer.add_tokens(3, Tokens(offset=0, ids=[1], text="a"))
    assert answer.add_tokens(2, Tokens(offset=1, ids=[9], text="x"))
    for revision in (2, 1, 2, 3):
        answer.add_promise(Promise(revision=revision))
    assert answer.add_tokens(3, Tokens(offset=1, ids=[2], text="b"))
    assert answer.add_finished(Finished(usage=Usage(output_tokens=2)))
    answer.add_promise(Promise(revision=4))
    assert answer.add_tokens(3, Tokens(offset=2, ids=[3], text="c"))
    kinds = [event.WhichOneof("event") for event in answer.take()]
    assert kinds == ["tokens", "promise", "promise", "tokens", "finished"]
    assert answer.take() == []


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(Path(tmp_path_factory.mktemp("tiny")))


@given(
    text=st.text(alphabet="the ab好🙂é", min_size=1, max_size=30),
    cuts=st.lists(st.integers(1, 60), max_size=5),
    held=st.integers(0, 4),
)
def test_text_is_divided_alike_and_joins_to_the_whole(
    tokenizer: Tokenizer, text: str, cuts: list[int], held: int
) -> None:
    ids = tokenizer.encode(text, special=False)
    decoder = tokenizer.decoder()
    bounds = [0, *sorted({cut for cut in cuts if cut < len(ids)}), len(ids)]
    chunks, sent, pushed = [], 0, 0
    for a, b in pairwise(bounds):
        pushed += len(decoder.push(ids[a:b]))
        # As a leader that holds back what may become a stop string.
        end = len(text) if b == len(ids) else max(sent, pushed - held)
        chunks.append(Tokens(offset=a, ids=ids[a:b], text=text[sent:end]))
        sent = end
    for i, chunk in enumerate(chunks):
        before = "".join(c.text for c in chunks[:i])
        for offset in range(chunk.offset + 1, chunk.offset + len(chunk.ids)):
            part = tokens_from(chunks[: i + 1], offset, tokenizer)
            assert (part.offset, list(part.ids)) == (offset, ids[offset : offset + len(part.ids)])
            assert (before + chunk.text).endswith(part.text)
            head = (before + chunk.text).removesuffix(part.text)
            decoded = tokenizer.decoder().push(ids[:offset])
            assert len(head) == min(max(len(decoded), len(before)), len(before + chunk.text))
            assert text.startswith(head)
