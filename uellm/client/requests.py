"""Requests from plain arguments."""

from collections.abc import Sequence
from itertools import chain

from uellm.class_defaults import CLASSES
from uellm.convert import duration
from uellm.core.errors import InvalidArgumentError
from uellm.v1 import common_pb2, inference_pb2

Turn = tuple[str, str]
"""A turn of a conversation: role and text."""
LARGEST_MAX_TOKENS = 2**32 - 1
LARGEST_SEED = 2**64 - 1
MOST_SECONDS = 315_576_000_000.0
"""Of a ``google.protobuf.Duration``: 10,000 years."""


def new_request(
    model: str,
    prompt: str | Sequence[Turn],
    *,
    adapter: str = "",
    max_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    deadline_seconds: float | None = None,
    ttft_seconds: float | None = None,
    tpot_seconds: float | None = None,
    priority: str = "",
    refuse: bool = False,
) -> inference_pb2.GenerateRequest:
    """A request for one answer.

    Args:
        model: a served model's name.
        prompt: text that is taken verbatim, or the turns of a conversation, oldest first, for the
            model's chat template.
        adapter: a LoRA adapter of the model; "": the model alone.
        max_tokens: most tokens to generate; None: the context that is left.
        temperature: 0 or None is greedy.
        seed: keys the generator of a sampled answer.
        stop: the answer ends before the first of these.
        deadline_seconds: when the whole answer is needed, counted from acceptance.
        ttft_seconds: when the first token is needed, counted from acceptance.
        tpot_seconds: how long each token after the first may take, in the mean.
        priority: its class, of ``CLASSES``; "" is normal.
        refuse: have it refused if the deadline cannot be met; else it is done as well as can be.

    Raises:
        InvalidArgumentError: if a number or a text does not fit the contract's field, or there is
            no such class.
    """
    _check_range("sampling.max_tokens", max_tokens, LARGEST_MAX_TOKENS)
    _check_range("sampling.seed", seed, LARGEST_SEED)
    objectives = {"deadline": deadline_seconds, "ttft": ttft_seconds, "tpot": tpot_seconds}
    for name, seconds in objectives.items():
        _check_seconds(f"slo.{name}", seconds)
    if priority and priority not in CLASSES:
        raise InvalidArgumentError(
            f"slo.priority: {priority!r}: one of {', '.join(CLASSES)}", field="slo.priority"
        )
    _check_text("model", model)
    _check_text("adapter", adapter)
    _check_text("sampling.stop", *stop)
    _check_text("prompt", *([prompt] if isinstance(prompt, str) else chain.from_iterable(prompt)))
    request = inference_pb2.GenerateRequest(
        model=model,
        adapter=adapter,
        sampling=common_pb2.Sampling(
            max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop
        ),
        on_infeasible=(
            common_pb2.ON_INFEASIBLE_REFUSE if refuse else common_pb2.ON_INFEASIBLE_BEST_EFFORT
        ),
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.chat.messages.extend(
            inference_pb2.ChatMessage(role=role, content=[inference_pb2.ContentPart(text=text)])
            for role, text in prompt
        )
    for name, seconds in objectives.items():
        if seconds is not None:
            getattr(request.slo, name).CopyFrom(duration(seconds))
    if priority:
        request.slo.priority = CLASSES[priority]
    return request


def _check_range(field: str, value: int | None, largest: int) -> None:
    if value is not None and not 0 <= value <= largest:
        raise InvalidArgumentError(f"{field}: {value}; between 0 and {largest}", field=field)


def _check_seconds(field: str, value: float | None) -> None:
    if value is not None and not abs(value) <= MOST_SECONDS:
        raise InvalidArgumentError(
            f"{field}: {value} s; a number of seconds, at most {MOST_SECONDS:.0f}", field=field
        )


def _check_text(field: str, *texts: str) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgumentError(
                f"{field}: half a character ({text[error.start]!r} at {error.start}), which UTF-8 "
                "cannot carry; read bytes as UTF-8, or with errors='replace'",
                field=field,
            ) from None
