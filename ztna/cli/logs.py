"""Logging of the command line: structlog to stderr, for people or as JSON lines.

An event passes: level filter, context, level name, UTC time, redaction, then the renderer. Levels
mean: `debug` what a developer asks for with -v; `info` what an operator wants to see of a healthy
node, such as 'registered' or 'ready'; `warning` and above, that something is wrong.
"""

import io
import logging
import os
import sys
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Literal, TextIO, cast

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

    level: of the logging module. Of libraries only warnings are shown, in the same form as our own
    lines, and of aioquic nothing, for our sessions tell the same in better words. DEBUG - 1,
    which `-vv` gives, shows all of both.
    stream: stderr if None.
    """
    target = _lossy(sys.stderr if stream is None else stream)
    colors = target.isatty() and not os.environ.get("NO_COLOR")
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        redact,
    ]
    renderers = _renderers(log_format, colors=colors)
    structlog.configure(
        processors=[*shared, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(max(level, logging.DEBUG)),
        logger_factory=structlog.WriteLoggerFactory(target),
        # Off, so that a module's logger follows a later call of this function.
        cache_logger_on_first_use=False,
    )
    everything = level < logging.DEBUG
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    logging.basicConfig(
        level=logging.DEBUG if everything else logging.WARNING, handlers=[handler], force=True
    )
    for name in ("quic", "aioquic"):
        logging.getLogger(name).setLevel(logging.DEBUG if everything else logging.CRITICAL)


class _Lossy(io.TextIOBase):
    """Where lines go. One that cannot be written, as on a full disk, is lost: a node goes on."""

    def __init__(self, target: TextIO) -> None:
        self._target = target

    def write(self, text: str) -> int:
        """Write, or not."""
        with suppress(OSError):
            self._target.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or not."""
        with suppress(OSError):
            self._target.flush()

    def isatty(self) -> bool:
        """Whether a person reads."""
        return self._target.isatty()


def _lossy(target: TextIO) -> TextIO:
    # A stream of text in all but the type, which no class of ours can have.
    return cast("TextIO", _Lossy(target))


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
