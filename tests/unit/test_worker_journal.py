"""Which operations an append of unknown outcome leaves to be said, by the records."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from uellm_worker.answer import Operation
from uellm_worker.journal import remaining

from uellm.streams.messages import Append, Finish, Record, Start, parse_record
from uellm.v1 import inference_pb2, queue_pb2


def record(tokens: int = 0, generation: int = 1, state: str = "RUNNING") -> Record:
    raw = {
        b"state": state.encode(),
        b"generation": str(generation).encode(),
        b"tokens": str(tokens).encode(),
        b"accepted_ms": b"1000",
        b"attempts": b"1",
    }
    return parse_record("m:1", raw)


def tokens(offset: int, count: int, generation: int = 1) -> Append:
    run = inference_pb2.Tokens(offset=offset, ids=range(offset, offset + count))
    return Append("m:1", generation, run)


def finish(generation: int = 1) -> Finish:
    return Finish("m:1", generation, "DONE", inference_pb2.Finished(), queue_pb2.CompletionEvent())


def test_nothing_took_effect() -> None:
    operations = [Start("m:1", 1), tokens(0, 3), tokens(3, 2)]
    assert remaining(operations, {"m:1": record(state="LEASED")}) == (operations, [])


def test_tokens_that_are_there_are_not_said_again() -> None:
    later = tokens(3, 2)
    assert remaining([tokens(0, 3), later], {"m:1": record(tokens=3)}) == ([later], [])


def test_an_end_that_took_effect_is_no_loss() -> None:
    ended = record(tokens=3, generation=2, state="DONE")
    assert remaining([tokens(0, 3), finish()], {"m:1": ended}) == ([], [])


def test_a_request_that_was_taken_over_is_lost() -> None:
    taken = record(tokens=3, generation=2, state="QUEUED")
    assert remaining([tokens(3, 1)], {"m:1": taken}) == ([], ["m:1"])
    assert remaining([tokens(3, 1)], {"m:1": None}) == ([], ["m:1"])
    assert remaining([tokens(3, 1)], {"m:1": replace(taken, state="DONE")}) == ([], ["m:1"])


@given(st.integers(0, 3), st.booleans())
def test_saying_it_until_it_is_said_says_it_once(failures: int, took_effect: bool) -> None:
    """Against a model of the script: whatever is lost on the way, each token is logged once."""
    log: list[int] = []
    left: list[Operation] = [tokens(0, 2), tokens(2, 3)]
    for _ in range(failures):
        if took_effect:
            _apply(log, left)
        left, lost = remaining(left, {"m:1": record(tokens=len(log))})
        assert lost == []
    _apply(log, left)
    assert log == [0, 1, 2, 3, 4]


def _apply(log: list[int], operations: list[Operation]) -> None:
    for operation in operations:
        assert isinstance(operation, Append)
        assert operation.tokens.offset == len(log)
        log += operation.tokens.ids
