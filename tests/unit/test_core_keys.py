"""Names in Redis, and request ids that carry their model."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uellm.core.errors import InvalidArgumentError
from uellm.streams.keys import MODEL_NAME, Keys, made_at, model_of, new_request_id

_models = st.from_regex(MODEL_NAME, fullmatch=True)


@given(_models)
def test_an_id_names_its_model(model: str) -> None:
    request_id = new_request_id(model)
    assert model_of(request_id) == model
    assert request_id not in {new_request_id(model) for _ in range(20)}


def test_ids_sort_by_time() -> None:
    ids = [new_request_id("m")[:-16] for _ in range(100)]
    assert ids == sorted(ids)


def test_an_id_says_when_it_was_made() -> None:
    before = time.time()
    assert before - 0.001 <= made_at(new_request_id("m")) <= time.time()


@given(st.text(max_size=60))
def test_no_other_text_is_an_id(text: str) -> None:
    try:
        model = model_of(text)
    except InvalidArgumentError as error:
        assert error.field == "request_id"
    else:
        assert MODEL_NAME.fullmatch(model)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "m",
        "m:",
        ":01m7xv62ffxr7gwear0g8dswsj",
        "m:01m7xv62ffxr7gwear0g8dswsj\n",
        "m:01M7XV62FFXR7GWEAR0G8DSWSJ",
        "m:01m7xv62ffxr7gwear0g8dswsjj",
        "{m}:01m7xv62ffxr7gwear0g8dswsj",
        "../m:01m7xv62ffxr7gwear0g8dswsj",
        "m:" + "٣" * 26,
        "a" * 129 + ":01m7xv62ffxr7gwear0g8dswsj",
    ],
)
def test_near_misses_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        model_of(text)


@given(_models)
def test_all_keys_of_a_model_share_a_slot(model: str) -> None:
    keys = Keys(model)
    request_id = new_request_id(model)
    names = [
        keys.requests,
        keys.completions,
        keys.dead,
        keys.leases,
        keys.owner,
        keys.request(request_id),
        keys.log(request_id),
        keys.batches("replica"),
        keys.replica("replica"),
        keys.frames("gateway"),
    ]
    assert len(set(names)) == len(names)
    # Redis hashes what stands between the first brace and the next closing one.
    assert {name.split("{", 1)[1].split("}", 1)[0] for name in names} == {model}
    assert all(name.startswith(keys.prefix) for name in names)
