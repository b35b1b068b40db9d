"""Logging: an event with fields, through the standard library's `logging`.

- Every logger is below ``rollfleet``. A library configures no handler and no level: until the process
  does, `logging` prints warnings and errors to stderr and nothing else.
- A record's message is the event and its fields in one line; `record.event` and `record.fields` hold
  them apart for handlers that want structure.
- Programs of rollfleet (worker, demo) call :func:`configure_logs`.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from rollfleet_common.text import printable

__all__ = ["Log", "configure_logs", "get_logger"]

ROOT = "rollfleet"
#: Characters of one value that are logged: a traceback may be long.
LONGEST = 50_000


class Log:
    """Logs events with fields to one logger of the standard library.

    A field `exc_info` is an exception whose traceback is logged, as in `logging`.
    """

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(name)

    def debug(self, event: str, /, **fields: Any) -> None:
        """Log at level DEBUG."""
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, /, **fields: Any) -> None:
        """Log at level INFO."""
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, /, **fields: Any) -> None:
        """Log at level WARNING."""
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, /, **fields: Any) -> None:
        """Log at level ERROR."""
        self._log(logging.ERROR, event, fields)

    def exception(self, event: str, /, **fields: Any) -> None:
        """Log at level ERROR, with the traceback of the exception that is being handled."""
        self._log(logging.ERROR, event, {"exc_info": True, **fields})

    def _log(self, level: int, event: str, fields: dict[str, Any]) -> None:
        if not self.logger.isEnabledFor(level):
            return
        exc_info = fields.pop("exc_info", None)
        extra = {"event": event, "fields": fields}
        self.logger.log(level, _line(event, fields), exc_info=exc_info, extra=extra, stacklevel=3)


def get_logger(name: str) -> Log:
    """The logger of a part of rollfleet.

    Args:
        name: ``rollfleet.<part>``, such as ``rollfleet.trainer``.
    """
    return Log(name)


def _line(event: str, fields: Mapping[str, Any]) -> str:
    return " ".join([event, *(f"{name}={_shown(value)}" for name, value in fields.items())])


def _shown(value: Any) -> str:
    text = str(value)
    plain = text.isprintable() and not any(mark in text for mark in " ='\"")
    return text if plain and text else repr(text)


# ---- for programs --------------------------------------------------------------------------------


class _Formatter(logging.Formatter):
    """Renders event, fields, level and time with one of structlog's renderers."""

    def __init__(self, render: Callable[[Any, str, dict[str, Any]], str | bytes]) -> None:
        super().__init__()
        self._render = render

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            **getattr(record, "fields", {}),
            "event": getattr(record, "event", None) or record.getMessage(),
            "level": record.levelname.lower(),
            "timestamp": at.isoformat().replace("+00:00", "Z"),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # No text of a server, a prompt or an exception reaches a terminal with escape sequences in it.
        for key, value in line.items():
            if isinstance(value, str):
                line[key] = printable(value, LONGEST, lines=True)
        text = self._render(None, record.levelname.lower(), line)
        return text if isinstance(text, str) else text.decode()


def configure_logs(level: str, style: str, file: TextIO | None = None) -> Callable[[], None]:
    """Set up the loggers of rollfleet for a program of its own; returns what undoes it.

    Args:
        level: "debug", "info", "warning" or "error": the least that is logged.
        style: "console", "json" (one object a line), or "auto" (console on a terminal, else JSON).
        file: Where lines go; stderr if not given.
    """
    import structlog  # noqa: PLC0415 - a trainer that logs as its user wishes needs no renderer

    out = sys.stderr if file is None else file
    pretty = style == "console" or (style == "auto" and out.isatty())
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=out.isatty())
        if pretty
        else structlog.processors.JSONRenderer(default=str)
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(_Formatter(renderer))
    root = logging.getLogger(ROOT)
    before = root.handlers[:], root.level, root.propagate
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False

    def undo() -> None:
        root.handlers[:], root.propagate = before[0], before[2]
        root.setLevel(before[1])

    return undo
