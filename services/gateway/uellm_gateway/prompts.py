"""A request's prompt as token ids."""

import asyncio

from uellm.core.errors import InvalidArgumentError
from uellm.models.tokenizer import Tokenizer
from uellm.v1 import inference_pb2

INLINE_CHARACTERS = 8_192
"""Longer prompts are tokenised in a thread, so that other calls go on meanwhile."""


def prompt_text(request: inference_pb2.GenerateRequest) -> str:
    """The prompt as the user wrote it; empty for token ids."""
    if request.HasField("chat"):
        parts = (part.text for message in request.chat.messages for part in message.content)
        return "\n".join(parts)
    return request.text


async def prompt_ids(request: inference_pb2.GenerateRequest, tokenizer: Tokenizer) -> list[int]:
    """The prompt by the model's tokenizer and chat template; token ids as they are.

    Raises:
        InvalidArgumentError: if the template refuses the messages, or nothing is left of the text.
    """
    if request.HasField("token_ids"):
        return list(request.token_ids.ids)
    # Four bytes a character at most; the exact length does not matter.
    if request.ByteSize() <= INLINE_CHARACTERS:
        ids = _encode(request, tokenizer)
    else:
        ids = await asyncio.to_thread(_encode, request, tokenizer)
    if not ids:
        raise InvalidArgumentError(
            "prompt: the model's tokenizer leaves nothing of it; give some text",
            field="prompt",
            reason="EMPTY_PROMPT",
        )
    return ids


def _encode(request: inference_pb2.GenerateRequest, tokenizer: Tokenizer) -> list[int]:
    if not request.HasField("chat"):
        return tokenizer.encode(request.text, special=True)
    messages = [
        {"role": message.role, "content": "".join(part.text for part in message.content)}
        for message in request.chat.messages
    ]
    return tokenizer.encode(tokenizer.render_chat(messages), special=False)
