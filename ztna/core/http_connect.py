"""The way through an HTTP proxy: one CONNECT request and its answer (RFC 9110 section 9.3.6).

`ConnectExchange` gives the request and reads the answer, as it comes and no further than its
header. What the proxy means by a refusal is said by `proxy_refusal`. No word of this module holds
the password.
"""

import base64
import re

import attrs
import h11

from ztna.core.addresses import format_address
from ztna.core.ports import Address
from ztna.errors import ProxyError, RemoteProtocolError

# Our choice: bytes of interim answers and the header of the last one. Proxies send some hundreds,
# and behind a refusal a page for people, which is not read.
MAX_ANSWER = 16_384
# Our choice: characters of the reason that are shown to people.
_MAX_REASON = 60

# RFC 9112 section 4: how a status line begins.
_HTTP = b"HTTP/1."
_NOT_HTTP = "its answer is not HTTP/1.1"
# RFC 9110 section 11.7.1: challenges, of which a header may hold several.
_BASIC = re.compile(rb"(?:^|,)[ \t]*basic(?:[ \t,]|$)", re.IGNORECASE)


@attrs.frozen
class Proxy:
    """An HTTP proxy. user: None where it asks for none. source: where it was named, for people."""

    host: str
    port: int
    user: str | None = None
    password: str = attrs.field(default="", repr=False)
    source: str = "`intermediate.proxy`"

    @property
    def address(self) -> Address:
        """Its name or IP address, and port."""
        return self.host, self.port

    def __str__(self) -> str:
        return f"HTTP proxy {format_address(self.address)}"


@attrs.frozen
class ConnectAnswer:
    """The header of a final answer. reason: printable, may be empty. takes_basic: whether a name
    and password would be taken."""

    status: int
    reason: str
    takes_basic: bool = False

    @property
    def through(self) -> bool:
        """Whether the connection is now one with the target."""
        return 200 <= self.status < 300

    def __str__(self) -> str:
        return f"{self.status} {self.reason}".rstrip()


@attrs.define(eq=False)
class ConnectExchange:
    """One request for a connection with a target."""

    proxy: Proxy
    target: Address
    _received: int = attrs.field(default=0, init=False)
    _start: bytes = attrs.field(default=b"", init=False, repr=False)
    _http: h11.Connection = attrs.field(
        factory=lambda: h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_ANSWER),
        init=False,
        repr=False,
    )

    def request_to_send(self) -> bytes:
        """The request, once."""
        authority = format_address(self.target)
        headers = [("Host", authority)]
        if self.proxy.user is not None:
            # RFC 7617 section 2.
            pair = f"{self.proxy.user}:{self.proxy.password}".encode()
            basic = base64.b64encode(pair).decode()
            headers.append(("Proxy-Authorization", f"Basic {basic}"))
        request = h11.Request(method="CONNECT", target=authority, headers=headers)
        return (self._http.send(request) or b"") + (self._http.send(h11.EndOfMessage()) or b"")

    def receive_bytes_untrusted(self, data: bytes) -> ConnectAnswer | None:
        """What has come; empty at the end. None until the answer is whole. Raises
        RemoteProtocolError."""
        if not data:
            raise RemoteProtocolError("it closed the connection before it answered")
        self._received += len(data)
        if self._received > MAX_ANSWER:
            raise RemoteProtocolError(f"its answer has more than {MAX_ANSWER} bytes")
        if len(self._start) < len(_HTTP):
            # Nothing else is waited for: what is no proxy may go on for long without an empty line.
            self._start = (self._start + data)[: len(_HTTP)]
            if not _HTTP.startswith(self._start):
                raise RemoteProtocolError(_NOT_HTTP)
        try:
            self._http.receive_data(data)
            event = self._http.next_event()
            while isinstance(event, h11.InformationalResponse):
                event = self._http.next_event()
        except h11.RemoteProtocolError as error:
            # The words of h11 quote what came.
            raise RemoteProtocolError(_NOT_HTTP) from error
        if not isinstance(event, h11.Response):
            return None
        answer = _answer_of(event)
        if answer.through and self._http.trailing_data[0]:
            # TLS begins with us, so no server has said this.
            raise RemoteProtocolError("it says more than that it has connected us")
        return answer


def _answer_of(response: h11.Response) -> ConnectAnswer:
    reason = bytes(response.reason).decode("ascii", "replace")
    return ConnectAnswer(
        response.status_code,
        "".join(each for each in reason if each.isascii() and each.isprintable())[:_MAX_REASON],
        any(
            name == b"proxy-authenticate" and _BASIC.search(value) is not None
            for name, value in response.headers
        ),
    )


def proxy_refusal(proxy: Proxy, target: Address, answer: ConnectAnswer) -> ProxyError:
    """What an answer means that does not let us through."""
    there = format_address(target)
    match answer.status:
        case 407 if not answer.takes_basic:
            found = (
                f"asks for a login that ztna does not speak, as it speaks Basic alone ({answer})"
            )
            todo = f"have it let {there} through without a login, or with one by Basic"
        case 407 if proxy.user is None:
            found = f"asks for a name and password ({answer})"
            todo = f"give them in {proxy.source}: http://USER:PASSWORD@HOST:PORT"
        case 401 | 407 if proxy.user is not None:
            # tinyproxy says 401 to a wrong password, and 407 to none.
            found = f"does not take the name and password that it was given ({answer})"
            todo = f"correct them in {proxy.source}"
        case 401 | 403:
            found = f"forbids connections to {there} ({answer})"
            todo = "whoever runs it can allow CONNECT to that name and port"
        case 400 | 405 | 501:
            found = f"does not take CONNECT ({answer})"
            todo = f"name a proxy in {proxy.source} that does"
        case 404 | 500 | 502 | 503 | 504:
            found = f"finds no way to {there} ({answer})"
            todo = "does the intermediate listen there (`tcp` in its file), and does the proxy "
            todo += "know its name?"
        case _:
            found = f"answers CONNECT with {answer}"
            todo = "see its log, or name another one"
    lasting = answer.status in {400, 401, 403, 405, 407, 501}
    return ProxyError(f"the {proxy} {found}", todo, lasting=lasting)
