"""What `uellm generate` and `uellm chat` say beside the answer."""

import io

import pytest

from uellm.cli.generation import check_adapter, warn_of_waiting
from uellm.core.errors import InvalidArgumentError
from uellm.v1.inference_pb2 import Model


def test_a_user_is_told_why_nothing_answers() -> None:
    notes = io.StringIO()
    warn_of_waiting(Model(name="m", replicas=1, status="waits for a worker"), notes)
    warn_of_waiting(Model(name="m", replicas=1), notes)
    first, second = notes.getvalue().splitlines()
    assert first.startswith("m: waits for a worker; ")
    assert second.startswith("m: no replica is ready; ")


def test_nothing_is_said_of_a_model_that_answers() -> None:
    notes = io.StringIO()
    warn_of_waiting(Model(name="m", replicas=2, ready_replicas=1, status="re-forming"), notes)
    assert notes.getvalue() == ""


def test_an_adapter_that_is_not_there_is_refused_with_those_that_are() -> None:
    model = Model(name="m", adapters=["ad1", "ad2"])
    check_adapter(model, "ad2")
    check_adapter(model, "")
    with pytest.raises(InvalidArgumentError, match=r"'ad' is served with m; choose of ad1, ad2"):
        check_adapter(model, "ad")
    with pytest.raises(InvalidArgumentError, match="with m; leave it out"):
        check_adapter(Model(name="m"), "ad1")
