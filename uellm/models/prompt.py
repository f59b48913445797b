"""A conversation as a model's own tokens, images included."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from uellm.models.image_tokens import ImageCounter, ImageNeeds, expanded
from uellm.models.tokenizer import Tokenizer

Content = Sequence[str | ImageNeeds]
"""Texts and images of a message, in order."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is given.

    Attributes:
        ids: its tokens; each image has as many placeholders as it comes to.
        image_tokens: how many those are.
        image_flops: work of encoding the images.
    """

    ids: list[int]
    image_tokens: int = 0
    image_flops: float = 0.0


def chat_prompt(
    messages: Sequence[tuple[str, Content]], tokenizer: Tokenizer, counter: ImageCounter | None
) -> Prompt:
    """The prompt that asks for the next turn.

    Args:
        messages: roles and contents, oldest first; images only with a ``counter``.
        tokenizer: the model's, with its chat template.
        counter: of a model that takes images.

    Raises:
        InvalidArgumentError: if the template refuses the messages, or does not place every image.
    """
    rendered = tokenizer.render_chat(
        [{"role": role, "content": _content(parts, counter)} for role, parts in messages]
    )
    ids = tokenizer.encode(rendered, special=False)
    if counter is None:
        return Prompt(ids)
    images = [part for _, parts in messages for part in parts if isinstance(part, ImageNeeds)]
    counts = [image.tokens for image in images]
    ids = expanded(ids, counter.placeholder, counts)
    return Prompt(ids, sum(counts), sum(image.flops for image in images))


def _content(parts: Content, counter: ImageCounter | None) -> Any:
    """What templates read: a string, or of models that take images a list of parts."""
    if counter is None:
        return "".join(part for part in parts if isinstance(part, str))
    return [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for part in parts
    ]
