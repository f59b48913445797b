"""Structured logs: JSON lines for machines, columns for people; never a prompt."""

import logging
import sys
from typing import Any

import structlog
from opentelemetry import trace


def _add_trace(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = f"{context.trace_id:032x}"
    return event


def configure(service: str, level: str, style: str) -> None:
    """Set up logging of this process, once.

    Args:
        service: bound to every line.
        level: least severe level written.
        style: auto, json or console.
    """
    console = style == "console" or (style == "auto" and sys.stderr.isatty())
    # Without the values of variables, which may be prompts.
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if console
        else structlog.processors.JSONRenderer()
    )
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_trace,
    ]
    if not console:
        processors.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)


def logger(name: str) -> structlog.typing.FilteringBoundLogger:
    """A logger bound to a component's name."""
    bound: structlog.typing.FilteringBoundLogger = structlog.get_logger(component=name)
    return bound
