"""What is wrong with a request whatever the state of the mesh: field, limit, remedy."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from uellm.convert import duration_seconds
from uellm.core.errors import InvalidArgumentError, NotFoundError
from uellm.v1 import common_pb2, inference_pb2

MOST_CHOICES = 16
MOST_STOPS = 8
MOST_STOP_CHARACTERS = 256
MOST_LOGPROBS = 20
MOST_TEMPERATURE = 2.0
MOST_DEADLINE_SECONDS = 24 * 3600.0
ROLES = ("system", "user", "assistant")
_IDEMPOTENCY_KEY = re.compile(r"[A-Za-z0-9._:@=+-]{1,200}")


def _refuse(field: str, problem: str, reason: str = "INVALID_ARGUMENT") -> InvalidArgumentError:
    return InvalidArgumentError(f"{field}: {problem}", field=field, reason=reason)


def check_request(request: inference_pb2.GenerateRequest, most_bytes: int) -> None:
    """Check everything that does not depend on the model.

    Raises:
        InvalidArgumentError: for the first thing that is wrong.
    """
    size = request.ByteSize()
    if size > most_bytes:
        raise InvalidArgumentError(
            f"the request has {size} bytes, more than the {most_bytes} allowed; shorten it, or "
            "raise UELLM_GATEWAY_MAX_REQUEST_BYTES",
            reason="REQUEST_TOO_LARGE",
        )
    if not request.model:
        raise _refuse("model", "empty; name one of those that ListModels returns")
    _check_prompt(request)
    check_sampling(request.sampling)
    check_slo(request.slo)
    if request.on_infeasible not in common_pb2.OnInfeasible.values():
        raise _refuse("on_infeasible", f"{request.on_infeasible} is no value of OnInfeasible")
    if request.on_disconnect not in inference_pb2.OnDisconnect.values():
        raise _refuse("on_disconnect", f"{request.on_disconnect} is no value of OnDisconnect")
    key = request.idempotency_key
    if key and not _IDEMPOTENCY_KEY.fullmatch(key):
        raise _refuse(
            "idempotency_key", "1 to 200 characters of A-Z a-z 0-9 . _ : @ = + - are allowed"
        )


def _check_prompt(request: inference_pb2.GenerateRequest) -> None:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise _refuse("prompt", "none given; set text, chat or token_ids", "EMPTY_PROMPT")
    if kind == "text" and not request.text:
        raise _refuse("text", "empty; give at least one character", "EMPTY_PROMPT")
    if kind == "token_ids" and not request.token_ids.ids:
        raise _refuse("token_ids.ids", "empty; give at least one token", "EMPTY_PROMPT")
    if kind == "chat":
        _check_chat(request.chat)


def _check_chat(chat: inference_pb2.Chat) -> None:
    if not chat.messages:
        raise _refuse("chat.messages", "empty; give at least one message", "EMPTY_PROMPT")
    for i, message in enumerate(chat.messages):
        at = f"chat.messages[{i}]"
        if message.role not in ROLES:
            raise _refuse(f"{at}.role", f"{message.role[:40]!r} is none of {', '.join(ROLES)}")
        for j, part in enumerate(message.content):
            if part.WhichOneof("part") is None:
                raise _refuse(f"{at}.content[{j}]", "empty part; set text or image")
    parts = [part for message in chat.messages for part in message.content]
    if not any(part.text or part.HasField("image") for part in parts):
        raise _refuse("chat.messages", "all are empty; give one of them text", "EMPTY_PROMPT")


def check_images(field: str, model: str, *, takes_images: bool, answered: bool) -> None:
    """Refuse images that nobody would look at.

    Args:
        field: where the first one is; "" if there is none.
        model: which is asked.
        takes_images: whether it does.
        answered: an answer is wanted, and not only an estimate.

    Raises:
        InvalidArgumentError: saying so.
    """
    if field and not takes_images:
        raise _refuse(field, f"{model} takes text only: leave the image out", "IMAGE_NOT_SUPPORTED")
    if field and answered:
        raise _refuse(
            field,
            f"{model} takes images, but no engine answers about them yet: Estimate says what it "
            "would take; leave the image out for an answer",
            "IMAGE_NOT_SUPPORTED",
        )


def check_sampling(sampling: common_pb2.Sampling) -> None:
    """Check what does not depend on the model.

    Raises:
        InvalidArgumentError: for the first thing that is wrong.
    """
    if sampling.HasField("max_tokens") and sampling.max_tokens == 0:
        raise _refuse("sampling.max_tokens", "0; ask for at least 1, or leave it unset")
    _check_range("sampling.temperature", sampling.temperature, 0.0, MOST_TEMPERATURE)
    if sampling.HasField("top_p"):
        _check_range("sampling.top_p", sampling.top_p, 0.0, 1.0)
        if sampling.top_p == 0:
            raise _refuse("sampling.top_p", "0; it is more than 0 and at most 1")
    if sampling.n > MOST_CHOICES:
        raise _refuse("sampling.n", f"{sampling.n}; at most {MOST_CHOICES}: send more requests")
    if sampling.logprobs > MOST_LOGPROBS:
        raise _refuse("sampling.logprobs", f"{sampling.logprobs}; at most {MOST_LOGPROBS}")
    if len(sampling.stop) > MOST_STOPS:
        raise _refuse("sampling.stop", f"{len(sampling.stop)} strings; at most {MOST_STOPS}")
    for i, stop in enumerate(sampling.stop):
        if not 0 < len(stop) <= MOST_STOP_CHARACTERS:
            raise _refuse(
                f"sampling.stop[{i}]",
                f"{len(stop)} characters; 1 to {MOST_STOP_CHARACTERS} are allowed",
            )


def _check_range(field: str, value: float, low: float, high: float) -> None:
    if math.isnan(value) or not low <= value <= high:
        raise _refuse(field, f"{value}; between {low:g} and {high:g}")


def check_slo(slo: common_pb2.Slo) -> None:
    """Check that what is asked for is ahead, near, and consistent.

    Raises:
        InvalidArgumentError: for the first thing that is wrong.
    """
    seconds: dict[str, float] = {}
    for name in ("deadline", "ttft", "tpot"):
        if not slo.HasField(name):
            continue
        value = duration_seconds(getattr(slo, name))
        if value <= 0:
            raise _refuse(
                f"slo.{name}",
                f"{value:g} s is past already; it counts from acceptance and is more than 0",
                "DEADLINE_PASSED" if name == "deadline" else "INVALID_ARGUMENT",
            )
        if value > MOST_DEADLINE_SECONDS:
            raise _refuse(
                f"slo.{name}", f"{value:g} s; at most {MOST_DEADLINE_SECONDS:g} s (24 hours)"
            )
        seconds[name] = value
    if seconds.get("ttft", 0.0) > seconds.get("deadline", math.inf):
        raise _refuse("slo.ttft", "later than slo.deadline; the first token comes before the last")
    if slo.priority not in common_pb2.Priority.values():
        raise _refuse("slo.priority", f"{slo.priority} is no value of Priority")


def check_token_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Check that the model knows every token.

    Raises:
        InvalidArgumentError: naming the first that it does not.
    """
    if max(ids) < vocab_size:
        return
    i = next(i for i, token in enumerate(ids) if token >= vocab_size)
    raise _refuse(
        f"token_ids.ids[{i}]",
        f"{ids[i]} is not in the vocabulary; ids are below {vocab_size}",
        "TOKEN_OUT_OF_VOCABULARY",
    )


def resolve_sampling(
    sampling: common_pb2.Sampling,
    *,
    prompt_tokens: int,
    context_tokens: int,
    vocab_size: int,
    defaults: Mapping[str, float],
    seed: int,
) -> common_pb2.Sampling:
    """A checked ``sampling`` with every default filled in.

    Args:
        sampling: as asked for.
        prompt_tokens: prompt length.
        context_tokens: the model's max_tokens: prompt and answer together.
        vocab_size: the model's.
        defaults: the model's own temperature, top_p and top_k, as far as it has any.
        seed: for a request that names none.

    Raises:
        InvalidArgumentError: if prompt and answer do not fit the model.
    """
    left = context_tokens - prompt_tokens
    if left < 1:
        raise _refuse(
            "prompt",
            f"{prompt_tokens} tokens; the model takes {context_tokens} for prompt and answer "
            f"together, so at most {context_tokens - 1}: shorten it",
            "PROMPT_TOO_LONG",
        )
    most = sampling.max_tokens if sampling.HasField("max_tokens") else left
    if most > left:
        raise _refuse(
            "sampling.max_tokens",
            f"{most}; a prompt of {prompt_tokens} tokens leaves {left} of the model's "
            f"{context_tokens}: ask for at most {left}, or leave it unset",
            "MAX_TOKENS_TOO_LARGE",
        )
    if sampling.min_tokens > most:
        raise _refuse("sampling.min_tokens", f"{sampling.min_tokens}; max_tokens is {most}")
    if sampling.top_k > vocab_size:
        raise _refuse("sampling.top_k", f"{sampling.top_k}; the vocabulary has {vocab_size}")
    resolved = common_pb2.Sampling()
    resolved.CopyFrom(sampling)
    resolved.max_tokens = most
    resolved.n = 1
    if not sampling.HasField("temperature"):
        resolved.temperature = defaults.get("temperature", 0.0)
    if not sampling.HasField("top_p"):
        resolved.top_p = defaults.get("top_p", 1.0)
    if not sampling.HasField("top_k"):
        resolved.top_k = int(defaults.get("top_k", 0))
    if not sampling.HasField("seed"):
        resolved.seed = seed
    return resolved


def unknown_model(name: str, served: Iterable[str]) -> NotFoundError:
    """The error for a model that is not served."""
    names = ", ".join(sorted(served)[:20])
    return NotFoundError(
        f"model: {name[:128]!r} is not served; "
        + (f"served are: {names}" if names else "no model is: deploy one with uellm up --model"),
        field="model",
        reason="MODEL_NOT_FOUND",
    )


def unknown_adapter(name: str, model: str, served: Iterable[str]) -> NotFoundError:
    """The error for an adapter that the model does not have."""
    names = ", ".join(sorted(served)[:20])
    return NotFoundError(
        f"adapter: {name[:128]!r} is not served with {model}; "
        + (f"served are: {names}; " if names else "")
        + "leave it empty for the base model",
        field="adapter",
        reason="ADAPTER_NOT_FOUND",
    )
