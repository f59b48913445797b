"""A checkpoint's tokenizer, chat template and end-of-sequence ids, read from its files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from uellm.core.errors import InvalidArgumentError, ModelFilesError
from uellm.models.chat_template import ChatTemplate
from uellm.models.decoding import (
    ByteDecoder,
    IncrementalDecoder,
    Pieces,
    WindowDecoder,
    byte_rendering,
)
from uellm.models.stopping import StopChecker

__all__ = ["IncrementalDecoder", "StopChecker", "Tokenizer"]


class Tokenizer:
    """What turns text into a model's ids and back.

    Args:
        directory: a checkpoint with tokenizer.json; tokenizer_config.json, chat_template.jinja,
            generation_config.json and config.json are read where they are there.

    Attributes:
        vocab_size: tokens in the vocabulary, added ones included. The model's own embedding may be
            padded beyond it.
        eos_ids: ids that end an answer.

    Raises:
        ModelFilesError: if tokenizer.json is missing or a file cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelFilesError(
                f"{directory}: no tokenizer.json; save the checkpoint with a fast tokenizer"
            )
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ModelFilesError(f"{path}: not a tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._directory = directory
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        rendering = byte_rendering(description.get("decoder"))
        self._pieces: Pieces | None = None
        if rendering is not None:
            self._pieces = Pieces(self._tokenizer, rendering, self._special)
        self.eos_ids = _eos_ids(directory)
        self._chat_source, self._special_tokens = _chat_files(directory)
        self._chat: ChatTemplate | None = None

    @property
    def has_chat_template(self) -> bool:
        """Whether chat messages can be rendered."""
        return bool(self._chat_source)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of ``text``; ``special`` adds what the post-processor adds (a chat prompt has it)."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens left out."""
        decoder = self.decoder()
        return decoder.push(ids) + decoder.flush()

    def decoder(self, prompt_ids: Sequence[int] = ()) -> IncrementalDecoder:
        """A decoder for one answer.

        With ``prompt_ids`` that end in text the answer goes on from it, so that a leading space
        is kept; else it begins the text, as ``decode`` of the answer alone would have it.
        """
        continues = bool(prompt_ids) and prompt_ids[-1] not in self._special
        if self._pieces is not None:
            return ByteDecoder(self._pieces, at_start=not continues)
        return WindowDecoder(
            self._tokenizer.decode, self._special, prompt_ids[-64:] if continues else ()
        )

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt for a conversation; each message has ``role`` and ``content`` (a string).

        Raises:
            InvalidArgumentError: if there is no template, or it refuses the messages.
        """
        if not self._chat_source:
            raise InvalidArgumentError(
                "chat: this model has no chat template; send text or token_ids",
                field="chat",
                reason="NO_CHAT_TEMPLATE",
            )
        if self._chat is None:
            self._chat = ChatTemplate(self._chat_source, self._special_tokens)
        return self._chat.render(messages)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{path}: {error}") from None
    return content if isinstance(content, dict) else {}


def _eos_ids(directory: Path) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        eos = _read_json(directory / name).get("eos_token_id")
        if eos is not None:
            return frozenset(eos if isinstance(eos, list) else [eos])
    return frozenset()


def _chat_files(directory: Path) -> tuple[str, dict[str, str]]:
    """The template's text ("" without one) and the special tokens it may name."""
    config = _read_json(directory / "tokenizer_config.json")
    special = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            special[name] = text
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8"), special
    template = config.get("chat_template") or ""
    if isinstance(template, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default", "")
    return str(template), special
