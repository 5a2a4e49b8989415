"""One event per line, with names: JSON for machines, columns for people."""

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Any

from dtrain.runtime import redact

Logger = Any
"""A structlog bound logger; structlog itself types it as Any."""


def configure(*, json_lines: bool | None = None, level: str = "INFO", component: str = "") -> None:
    """Send all logs of this process to stderr.

    ``json_lines`` None: JSON unless stderr is a terminal.
    """
    import structlog

    as_json = not sys.stderr.isatty() if json_lines is None else json_lines
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _without_secrets,
    ]
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(colors="NO_COLOR" not in os.environ and sys.stderr.isatty())
    )
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    if component:
        structlog.contextvars.bind_contextvars(component=component)


def _without_secrets(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Hide what must not be in a log, whoever has put it there: values by their names, URLs' users."""
    for name, value in line.items():
        if isinstance(value, str):
            line[name] = redact.HIDDEN if value and redact.is_secret(name) else redact.url(value)
    return line


def get(name: str) -> Logger:
    """Return a logger whose lines carry ``source=name``."""
    # Here: a command that reads a record and ends writes no log, and waits 50 ms for structlog.
    import structlog

    return structlog.get_logger(source=name)
