"""A model's chat template: Jinja that came with the checkpoint, run in a sandbox."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from uellm.core.errors import InvalidArgumentError

MOST_CHARACTERS = 4_000_000
"""A rendered prompt longer than this is no prompt of any model served."""


class _Generation(Extension):
    """``{% generation %}``, which marks what a model trains on: the body alone."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance attribute

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, without the operators that make much of little."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or not all(isinstance(value, int | float) for value in (left, right)):
            raise TemplateError(f"operator {operator} is for products of numbers")
        return left * right


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    """JSON as models are trained on it: not escaped for HTML."""
    return json.dumps(value, ensure_ascii=bool(options.get("ensure_ascii")), indent=indent)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One template, compiled.

    Args:
        source: the Jinja text.
        special_tokens: bos_token, eos_token and the like, by name.

    Raises:
        InvalidArgumentError: if the template is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise _broken(error) from None
        # Jinja chains them to the environment's; each rendering copies them, a plain dict faster.
        self._template.globals = dict(self._template.globals)
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt that asks for the next turn of the assistant.

        Raises:
            InvalidArgumentError: if the template refuses the messages, fails, or writes too much.
        """
        variables = {
            **self._special_tokens,
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate(variables):
                length += len(part)
                if length > MOST_CHARACTERS:
                    raise TemplateError(f"wrote more than {MOST_CHARACTERS} characters")
                parts.append(part)
        except Exception as error:  # the template is foreign code: any of them is its own
            raise _broken(error) from None
        return "".join(parts)


def _broken(error: BaseException) -> InvalidArgumentError:
    detail = str(error) or type(error).__name__
    return InvalidArgumentError(
        f"chat: the model's chat template does not take these messages: {detail[:300]}; change "
        "them, or send text",
        field="chat.messages",
        reason="CHAT_TEMPLATE",
    )
