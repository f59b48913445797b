"""`uellm generate`, `estimate`, `chat` and `cancel`, behind their options."""

import asyncio
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from uellm.cli import exits
from uellm.cli.promises import (
    ANSWERED,
    describe_end,
    describe_estimate,
    describe_promise,
    leaves_a_question,
)
from uellm.client import Client, new_request
from uellm.client.requests import Turn
from uellm.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UellmError,
    UnavailableError,
)
from uellm.v1 import common_pb2, inference_pb2


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a user asks for besides the prompt; the fields are those of ``new_request``."""

    model: str = ""
    adapter: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    deadline_seconds: float | None = None
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    priority: str = ""
    refuse: bool = False

    def request(self, model: str, prompt: str | Sequence[Turn]) -> inference_pb2.GenerateRequest:
        """The request for an answer to ``prompt``."""
        return new_request(
            model,
            prompt,
            adapter=self.adapter,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self.seed,
            stop=self.stop,
            deadline_seconds=self.deadline_seconds,
            ttft_seconds=self.ttft_seconds,
            tpot_seconds=self.tpot_seconds,
            priority=self.priority,
            refuse=self.refuse,
        )


@dataclass(slots=True)
class Outcome:
    """What came of a request."""

    request_id: str = ""
    text: str = ""
    promises: list[common_pb2.Promise] = field(default_factory=list)
    finished: inference_pb2.Finished | None = None

    @property
    def status(self) -> int:
        """The exit status it comes to."""
        answered = self.finished is not None and self.finished.reason in ANSWERED
        return exits.OK if answered else exits.FAILED

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "request_id": self.request_id,
            "text": self.text,
            "promises": [_facts(promise) for promise in self.promises],
            "finished": _facts(self.finished) if self.finished is not None else None,
        }


def _facts(message: Message) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True)


async def choose_model(client: Client, name: str) -> inference_pb2.Model:
    """The model of that name; with no name, the only one.

    Raises:
        UellmError: if there is none, or the choice is open.
    """
    models = await client.models()
    names = ", ".join(model.name for model in models) or "none"
    if not name and len(models) == 1:
        return models[0]
    found = next((model for model in models if model.name == name), None)
    if found is not None:
        return found
    if name:
        raise InvalidArgumentError(f"no model {name!r} is served (served: {names})", field="model")
    if models:
        raise InvalidArgumentError(f"several models are served: choose with --model ({names})")
    raise FailedPreconditionError("no model is served; serve one with `uellm up --model …`")


def check_adapter(model: inference_pb2.Model, name: str) -> None:
    """Whether requests of the model may name this adapter; "" is the model alone.

    Raises:
        InvalidArgumentError: if it has none of that name.
    """
    if name and name not in model.adapters:
        served = ", ".join(model.adapters)
        remedy = f"choose of {served} with --adapter, or leave it out" if served else "leave it out"
        raise InvalidArgumentError(
            f"no adapter {name!r} is served with {model.name}; {remedy}", field="adapter"
        )


def warn_of_waiting(model: inference_pb2.Model, notes: TextIO) -> None:
    """Say that a request will wait, if nothing is there that could answer it."""
    if not model.ready_replicas:
        why = model.status or "no replica is ready"
        notes.write(f"{model.name}: {why}; the request waits in the queue, Ctrl-C cancels it\n")


async def answer(
    client: Client, request: inference_pb2.GenerateRequest, out: TextIO | None, notes: TextIO | None
) -> Outcome:
    """Stream an answer to ``out``, and the promise and what became of it to ``notes``."""
    outcome = Outcome()
    refuse = request.on_infeasible == common_pb2.ON_INFEASIBLE_REFUSE
    async with contextlib.aclosing(client.generate(request)) as events:
        try:
            async for event in events:
                _take(outcome, event, out, notes, refuse=refuse)
        except ResourceExhaustedError:
            # A refused call ends with a status too, which says what its end has said.
            if outcome.finished is None:
                raise
    if out is not None and outcome.text and not outcome.text.endswith("\n"):
        out.write("\n")
    if notes is not None and outcome.finished is not None:
        first = outcome.promises[0] if outcome.promises else None
        notes.write(f"{describe_end(outcome.finished, first)}\n")
        if leaves_a_question(outcome.finished, first):
            notes.write(f"`uellm why {outcome.request_id}` says why\n")
    return outcome


def _take(
    outcome: Outcome,
    event: inference_pb2.GenerationEvent,
    out: TextIO | None,
    notes: TextIO | None,
    *,
    refuse: bool,
) -> None:
    outcome.request_id = event.request_id
    match event.WhichOneof("event"):
        case "promise":
            # What is feasible is named to one that is refused; it is no promise.
            refused = refuse and event.promise.HasField("earliest_feasible_finish")
            if notes is not None and not outcome.promises and not refused:
                notes.write(f"{describe_promise(event.promise)}\n")
            outcome.promises.append(event.promise)
        case "tokens":
            outcome.text += event.tokens.text
            if out is not None:
                out.write(event.tokens.text)
                out.flush()
        case "finished":
            outcome.finished = event.finished


async def generate(
    servers: Sequence[str], prompt: str, wishes: Wishes, *, as_chat: bool | None, as_json: bool
) -> int:
    """One prompt, one answer.

    Args:
        servers: gateway addresses.
        prompt: the prompt.
        wishes: the rest of the request.
        as_chat: render with the chat template; None: if the model has one.
        as_json: print one JSON object instead of the text as it comes.
    """
    async with Client(servers) as client:
        model = await choose_model(client, wishes.model)
        request = _request(model, prompt, wishes, as_chat)
        warn_of_waiting(model, sys.stderr)
        out = None if as_json else sys.stdout
        outcome = await answer(client, request, out, None if as_json else sys.stderr)
        if as_json:
            sys.stdout.write(json.dumps(outcome.as_dict(), indent=1) + "\n")
        return outcome.status


async def estimate(
    servers: Sequence[str], prompt: str, wishes: Wishes, *, as_chat: bool | None, as_json: bool
) -> int:
    """What would be promised; the arguments are those of ``generate``."""
    async with Client(servers) as client:
        model = await choose_model(client, wishes.model)
        found = await client.estimate(_request(model, prompt, wishes, as_chat))
    if as_json:
        sys.stdout.write(json.dumps(_facts(found), indent=1) + "\n")
    else:
        sys.stdout.write("\n".join(describe_estimate(found)) + "\n")
    return exits.FAILED if found.HasField("refusal") else exits.OK


def _request(
    model: inference_pb2.Model, prompt: str, wishes: Wishes, as_chat: bool | None
) -> inference_pb2.GenerateRequest:
    check_adapter(model, wishes.adapter)
    templated = model.has_chat_template if as_chat is None else as_chat
    return wishes.request(model.name, [("user", prompt)] if templated else prompt)


async def cancel(servers: Sequence[str], request_id: str, *, as_json: bool) -> int:
    """End a request."""
    async with Client(servers) as client:
        response = await client.cancel(request_id)
    state = common_pb2.RequestState.Name(response.state).removeprefix("REQUEST_STATE_")
    if as_json:
        sys.stdout.write(json.dumps({"request_id": request_id, "state": state}) + "\n")
    elif response.state == common_pb2.REQUEST_STATE_CANCELLED:
        sys.stdout.write("cancelled\n")
    else:
        sys.stdout.write(f"had ended before: {state}\n")
    return exits.OK


def chat(servers: Sequence[str], wishes: Wishes, system: str) -> int:
    """A conversation, until end of input. Ctrl-C ends the answer, or on an empty line the chat."""
    turns: list[Turn] = [("system", system)] if system else []
    with asyncio.Runner() as runner:
        client = Client(servers)
        try:
            chosen = runner.run(choose_model(client, wishes.model))
            check_adapter(chosen, wishes.adapter)
            model = chosen.name
            sys.stderr.write(f"{model}: Ctrl-D ends\n")
            warn_of_waiting(chosen, sys.stderr)
            while (line := _read_line()) is not None:
                if line:
                    _take_turn(runner, client, wishes, model, turns, line)
        except KeyboardInterrupt:
            sys.stderr.write("\n")
        finally:
            runner.run(client.close())
    return exits.OK


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _take_turn(
    runner: asyncio.Runner,
    client: Client,
    wishes: Wishes,
    model: str,
    turns: list[Turn],
    line: str,
) -> None:
    """Ask and answer; a turn that failed or was interrupted is not part of the conversation."""
    asked = [*turns, ("user", line)]
    try:
        outcome = runner.run(answer(client, wishes.request(model, asked), sys.stdout, sys.stderr))
    except KeyboardInterrupt:
        sys.stderr.write("\ncancelled\n")
    except UnavailableError:
        raise
    except UellmError as error:
        exits.complain(error)
    else:
        if outcome.status == exits.OK:
            turns[:] = [*asked, ("assistant", outcome.text)]
