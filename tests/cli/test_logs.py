"""What a log line looks like, and what never stands in one."""

import errno
import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog
import trio

from ztna.cli.logs import LogFormat, configure_logging


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    logging.basicConfig(handlers=handlers, level=level, force=True)
    for name in ("quic", "aioquic"):
        logging.getLogger(name).setLevel(logging.NOTSET)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def logs(log_format: LogFormat, level: int = logging.INFO) -> io.StringIO:
    stream = io.StringIO()
    configure_logging(log_format, level, stream)
    return stream


def test_json_line() -> None:
    stream = logs("json")
    structlog.get_logger("ztna.x").info("registered", service="web", peer=("192.0.2.1", 5))
    line = json.loads(stream.getvalue())
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "registered",
        "level": "info",
        "service": "web",
        "peer": ["192.0.2.1", 5],
    }


def test_human_line_has_no_colour_off_a_terminal() -> None:
    stream = logs("human")
    structlog.get_logger().warning("no answer", host="relay.example.net")
    line = stream.getvalue()
    assert "[warning  ] no answer" in line
    assert "host=relay.example.net" in line
    assert line.count("\n") == 1
    assert "\x1b" not in line


def test_colour_on_a_terminal_unless_unwanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for unwanted in ("", "1"):
        monkeypatch.setenv("NO_COLOR", unwanted)
        stream = Terminal()
        configure_logging("human", stream=stream)
        structlog.get_logger().info("ready")
        assert ("\x1b" in stream.getvalue()) is not bool(unwanted)


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_secrets_never_stand_in_a_line(log_format: LogFormat) -> None:
    stream = logs(log_format)
    structlog.get_logger().info(
        "message",
        key="S3CRET",
        private_key=b"S3CRET",
        Token="S3CRET",
        payload=b"S3CRET",
        nested={"secret": "S3CRET", "fine": 5},
        anything=b"S3CRET",
        parts=[bytearray(b"S3CRET"), memoryview(b"S3CRET")],
        keyword="shown",
    )
    text = stream.getvalue()
    assert "S3CRET" not in text
    assert "shown" in text
    assert "[redacted]" in text
    assert "[6 bytes]" in text


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_text_from_the_network_cannot_steer_the_terminal(log_format: LogFormat) -> None:
    stream = logs(log_format)
    structlog.get_logger().info("closed: \x1b[2J\nx", reason="\x1b[2J\r\nready", peer="a\x9bb")
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    assert "\x9b" not in text
    assert text.count("\n") == 1


def test_levels() -> None:
    stream = logs("json", logging.WARNING)
    structlog.get_logger().info("quiet")
    assert stream.getvalue() == ""
    stream = logs("json", logging.DEBUG)
    structlog.get_logger().debug("loud")
    assert "loud" in stream.getvalue()


def test_module_loggers_follow_a_later_configuration() -> None:
    log = structlog.get_logger("module")
    logs("json")
    log.info("first")
    stream = logs("json")
    log.info("second")
    assert json.loads(stream.getvalue())["event"] == "second"


def test_of_libraries_only_warnings_are_shown_in_the_form_of_our_own() -> None:
    stream = logs("json", logging.DEBUG)
    logging.getLogger("other").info("hello")
    assert stream.getvalue() == ""
    logging.getLogger("other").warning("odd %s\n\x1b[2J", "thing")
    line = json.loads(stream.getvalue())
    assert (line["level"], line["logger"]) == ("warning", "other")
    assert line["event"] == "odd thing\\n\\x1b[2J"
    assert line["timestamp"].endswith("Z")


@pytest.mark.parametrize("name", ["quic", "aioquic"])
def test_what_our_sessions_tell_is_not_told_twice(name: str) -> None:
    stream = logs("human")
    logging.getLogger(name).warning("Error: 298, reason: bad certificate")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("name", ["quic", "other"])
def test_libraries_speak_when_asked_twice(name: str) -> None:
    stream = logs("human", logging.DEBUG - 1)
    logging.getLogger(name).debug("handshake")
    assert "handshake" in stream.getvalue()
    structlog.get_logger().debug("ours too")
    assert "ours too" in stream.getvalue()


async def test_context_survives_a_thread() -> None:
    stream = logs("json")
    structlog.contextvars.bind_contextvars(session=7)
    await trio.to_thread.run_sync(lambda: structlog.get_logger().info("from a thread"))
    assert json.loads(stream.getvalue())["session"] == 7


class Full(io.StringIO):
    """As a file on a full disk, write(2)."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, f"no room for {len(text)} characters")

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "no room")


def test_a_line_that_cannot_be_written_is_lost() -> None:
    configure_logging("human", logging.INFO, Full())
    structlog.get_logger().info("to nowhere")
    logging.getLogger("library").warning("to nowhere")
