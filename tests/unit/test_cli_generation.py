"""What `uellm generate` and `uellm chat` say beside the answer."""

import io

from uellm.cli.generation import warn_of_waiting
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
