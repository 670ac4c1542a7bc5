"""Logging of the command line: structlog to stderr, for people or as JSON lines.

An event passes: level filter, context, level name, UTC time, redaction, then the renderer. Levels
mean: `debug` what a developer asks for with -v; `info` what an operator wants to see of a healthy
node, such as 'registered' or 'ready'; `warning` and above, that something is wrong.
"""

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Literal, TextIO

import structlog
from structlog.typing import Processor

from ztna.cli.text import printable

LogFormat = Literal["human", "json"]

# The last word of a field's name: its value never reaches a log.
_SECRET_WORDS = frozenset({"key", "payload", "secret", "token", "password", "passphrase"})
_COLUMN = 34


def configure_logging(
    log_format: LogFormat, level: int = logging.INFO, stream: TextIO | None = None
) -> None:
    """Set structlog and the standard library's logging up, for the whole process.

    level: of the logging module. Below WARNING, libraries are silent unless it is DEBUG - 1,
    which `-vv` gives.
    stream: stderr if None.
    """
    target = sys.stderr if stream is None else stream
    colors = target.isatty() and not os.environ.get("NO_COLOR")
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            redact,
            *_renderers(log_format, colors=colors),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(max(level, logging.DEBUG)),
        logger_factory=structlog.WriteLoggerFactory(target),
        # Off, so that a module's logger follows a later call of this function.
        cache_logger_on_first_use=False,
    )
    library_level = logging.WARNING if level >= logging.DEBUG else logging.DEBUG
    logging.basicConfig(
        stream=target,
        level=library_level,
        force=True,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    for name in ("quic", "aioquic"):
        logging.getLogger(name).setLevel(library_level)


def redact(_logger: object, _method: str, event: MutableMapping[str, object]) -> dict[str, object]:
    """Replace what must not be logged: fields named like secrets, and raw bytes of any name.

    Text that came from the network cannot steer the terminal, nor end the line and begin another.
    """
    return {name: _redacted(name, value) for name, value in event.items()}


def _redacted(name: str, value: object) -> object:
    if name.lower().rpartition("_")[2] in _SECRET_WORDS:
        return "[redacted]"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"[{len(value)} bytes]"
    if isinstance(value, dict):
        return {key: _redacted(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted("", inner) for inner in value]
    if isinstance(value, str):
        return printable(value).replace("\n", "\\n")
    return value


def _renderers(log_format: LogFormat, *, colors: bool) -> list[Processor]:
    if log_format == "json":
        return [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ]
    return [
        structlog.dev.ConsoleRenderer(
            colors=colors,
            pad_event_to=_COLUMN,
            sort_keys=False,
            exception_formatter=structlog.dev.plain_traceback,
        )
    ]
