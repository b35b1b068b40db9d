"""Logging: one line a transition, with ids; for people on a terminal, JSON elsewhere."""

import logging
import sys
from typing import Any

import structlog

__all__ = ["configure_logs"]


def configure_logs(level: str, style: str) -> None:
    """Set up structlog for a process of ours; a library user's own set-up is left alone.

    Args:
        level: "debug", "info", "warning" or "error".
        style: "console", "json", or "auto" (console on a terminal).
    """
    pretty = style == "console" or (style == "auto" and sys.stderr.isatty())
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if pretty
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
