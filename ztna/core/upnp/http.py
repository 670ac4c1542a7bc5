"""As much of HTTP as UPnP needs: requests with a body, and one answer a connection (RFC 9112).

What comes is read by `parse_response_untrusted`, again with each piece of it until it is whole;
the same head, without a body, is what SSDP's answers are. Everything has a bound.
"""

import re

import attrs

from ztna.core.ports import Buffer
from ztna.errors import RemoteProtocolError

# Our choices: bytes. Descriptions of gateways have some 3 to 15 KiB.
MAX_HEAD = 8_192
MAX_RESPONSE = 65_536

_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: [^\r\n]*)?")
# RFC 9110 section 5.6.2, a token; values may be anything that is no line's end.
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}):[ \t]*([^\r\n\0]*?)[ \t]*")
_NUMBER = re.compile(rb"[0-9]{1,6}")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,6})(?:;[^\r\n]*)?\r\n")


@attrs.frozen
class Head:
    """Status line and header. fields: the first of each name, which is in lower case."""

    status: int
    fields: dict[str, str]


@attrs.frozen
class Response:
    """A whole answer."""

    status: int
    body: bytes


def build_request(method: str, host: str, path: str, *fields: str, body: bytes = b"") -> bytes:
    """A request after which the server closes. host: as in its URL; path: printable ASCII without
    blanks, as `messages` lets no other in."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", *fields]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join((*lines, "", "")).encode() + body


def parse_head_untrusted(data: Buffer) -> Head:
    """Status line and header, all of it. Raises RemoteProtocolError."""
    if len(data) > MAX_HEAD:
        raise RemoteProtocolError(f"header of an HTTP answer of more than {MAX_HEAD} bytes")
    first, *lines = bytes(data).split(b"\r\n")
    status = _STATUS.fullmatch(first)
    if status is None:
        raise RemoteProtocolError("an HTTP answer that does not begin with a status")
    fields: dict[str, str] = {}
    for line in filter(None, lines):
        field = _FIELD.fullmatch(line)
        if field is None:
            raise RemoteProtocolError("an HTTP answer with a line that is no header field")
        fields.setdefault(field[1].decode().lower(), field[2].decode("latin-1"))
    return Head(int(status[1]), fields)


def parse_response_untrusted(data: Buffer, *, ended: bool) -> Response | None:
    """What has come so far of an answer; None if there must be more. ended: there is no more.
    Raises RemoteProtocolError."""
    data = bytes(data)
    if len(data) > MAX_RESPONSE:
        raise RemoteProtocolError(f"an HTTP answer of more than {MAX_RESPONSE} bytes")
    while True:
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if ended or len(data) > MAX_HEAD:
                raise RemoteProtocolError("an HTTP answer without the end of its header")
            return None
        head, data = parse_head_untrusted(data[:end]), data[end + 4 :]
        if head.status >= 200:
            break
        # RFC 9110 section 15.2: interim ones come before the answer.
    body = _body(head, data, ended=ended)
    if body is None and ended:
        raise RemoteProtocolError("an HTTP answer that breaks off")
    return None if body is None else Response(head.status, body)


def _body(head: Head, data: bytes, *, ended: bool) -> bytes | None:
    """RFC 9112 section 6.3; None while it is not whole."""
    coding, length = head.fields.get("transfer-encoding"), head.fields.get("content-length")
    if coding is not None:
        if coding.lower() != "chunked":
            raise RemoteProtocolError("an HTTP answer in a coding that nobody asked for")
        return _chunks(data)
    if length is not None:
        if _NUMBER.fullmatch(length.encode("latin-1")) is None:
            raise RemoteProtocolError("an HTTP answer whose length is no number")
        size = int(length)
        if size > MAX_RESPONSE:
            raise RemoteProtocolError(f"an HTTP answer of {size} bytes, more than {MAX_RESPONSE}")
        return data[:size] if len(data) >= size else None
    return data if ended else None


def _chunks(data: bytes) -> bytes | None:
    """RFC 9112 section 7.1; trailers are not looked at."""
    body, at = b"", 0
    while True:
        line = _CHUNK.match(data, at)
        if line is None:
            # 16 bytes hold any size; extensions are for nobody.
            if len(data) - at > 16:
                raise RemoteProtocolError("an HTTP answer with a chunk that has no size")
            return None
        size = int(line[1], 16)
        if size == 0:
            return body
        at = line.end() + size + 2
        if len(data) < at:
            if size > MAX_RESPONSE:
                raise RemoteProtocolError(f"an HTTP chunk of {size} bytes: more than may come")
            return None
        body += data[line.end() : line.end() + size]
        if data[at - 2 : at] != b"\r\n":
            raise RemoteProtocolError("an HTTP answer with a chunk that is longer than its size")
