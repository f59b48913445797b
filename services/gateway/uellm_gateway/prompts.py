"""A request's prompt as token ids."""

import asyncio

from uellm.core.errors import InvalidArgumentError
from uellm.models.image_tokens import ImageCounter, ImageNeeds
from uellm.models.images import check_count, read_image
from uellm.models.prompt import Prompt, chat_prompt
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


def image_field(request: inference_pb2.GenerateRequest) -> str:
    """Where the first image is; "" if there is none."""
    return next(
        (
            f"chat.messages[{i}].content[{j}].image"
            for i, message in enumerate(request.chat.messages)
            for j, part in enumerate(message.content)
            if part.HasField("image")
        ),
        "",
    )


async def read_prompt(
    request: inference_pb2.GenerateRequest, tokenizer: Tokenizer, counter: ImageCounter | None
) -> Prompt:
    """The prompt by the model's tokenizer and chat template; token ids as they are.

    Args:
        request: checked; with images only if there is a ``counter``.
        tokenizer: the model's.
        counter: how it counts images.

    Raises:
        InvalidArgumentError: if the template refuses the messages, nothing is left of the text, or
            an image is not what it should be.
    """
    if request.HasField("token_ids"):
        return Prompt(list(request.token_ids.ids))
    # Four bytes a character at most; the exact length does not matter.
    if request.ByteSize() <= INLINE_CHARACTERS:
        prompt = _read(request, tokenizer, counter)
    else:
        prompt = await asyncio.to_thread(_read, request, tokenizer, counter)
    if not prompt.ids:
        raise InvalidArgumentError(
            "prompt: the model's tokenizer leaves nothing of it; give some text",
            field="prompt",
            reason="EMPTY_PROMPT",
        )
    return prompt


def _read(
    request: inference_pb2.GenerateRequest, tokenizer: Tokenizer, counter: ImageCounter | None
) -> Prompt:
    if not request.HasField("chat"):
        return Prompt(tokenizer.encode(request.text, special=True))
    messages = request.chat.messages
    check_count(
        sum(part.HasField("image") for message in messages for part in message.content),
        "chat.messages",
    )
    contents = [
        (
            message.role,
            [
                part.text
                if counter is None or not part.HasField("image")
                else _image(part.image, counter, f"chat.messages[{i}].content[{j}].image")
                for j, part in enumerate(message.content)
            ],
        )
        for i, message in enumerate(messages)
    ]
    return chat_prompt(contents, tokenizer, counter)


def _image(image: inference_pb2.Image, counter: ImageCounter, field: str) -> ImageNeeds:
    return counter.needs(read_image(image.data, image.media_type, field), field)
