"""Asks a gateway for one mapped UDP port by UPnP-IGD, and keeps it.

`UpnpMapper` knows no socket. Its caller sends `datagrams_to_send` to `messages.SSDP` and hands over
what comes back (`receive_datagram_untrusted`); makes a TCP connection to the gateway for each
`request_to_send` and hands over what comes, all of it with each piece, until that says it is whole
(`receive_response_untrusted`), or says `failed`; calls `handle_timer` at `get_timer`.

    search -> description -> outer address -> map -> mapped
    mapped: a look every minute, at the outer address and the mapping; what is lost is asked for
    anew, and all from the search on when the gateway does not answer; renewed at half of its life;
    `stop` deletes it

One thing at a time. An outer address that is private itself is of no use, and then no port is
mapped; nor is one by a gateway that knows mappings without an end alone, as nobody would end that
of a machine that was switched off.
"""

import enum
import ipaddress
import math
import random
from collections.abc import Mapping, Sequence

import attrs

from ztna.core.portmap import (
    LIFETIME,
    LONGEST_REST,
    LOOK_INTERVAL,
    RENEWAL_SHARE,
    REST,
    SHORTEST_REST,
    unusable,
)
from ztna.core.ports import Address, Buffer
from ztna.core.upnp import messages as wire
from ztna.core.upnp.http import Response, parse_response_untrusted
from ztna.errors import RemoteProtocolError

# Our choices: s for a search, and for a request from the connection on; each is made again once or
# twice. UDA 1.1 section 3.2 gives a gateway 30 s, which nobody waits for.
SEARCH_TIME, REQUEST_TIME = 1.5, 3.0
SEARCHES, REQUESTS = 3, 2
# Other outer ports that are tried where ours is taken; our choice.
OTHER_PORTS = 4
_DYNAMIC_PORTS = (49_152, 65_536)  # RFC 6335 section 6
_DESCRIPTION = "ztna"


class _Step(enum.Enum):
    """What is awaited; the value is the action."""

    SEARCH = "search"
    DESCRIBE = "description"
    ADDRESS = "GetExternalIPAddress"
    MAP = "AddPortMapping"
    MAP_ANY = "AddAnyPortMapping"
    LOOK = "GetSpecificPortMappingEntry"
    DELETE = "DeletePortMapping"


# UDA 1.1 section 3.2.2, WANIPConnection:2 sections 2.5.16 and 2.5.18.
_INVALID_ACTION, _NOT_IMPLEMENTED = 401, 602
_NO_SUCH_ENTRY, _CONFLICT, _CONFLICT_WITH_OTHERS = 714, 718, 729
_WORDS = {
    501: "it cannot do it now",
    606: "it does not allow it",
    724: "the same port outside is taken, and it gives no other",
    725: "it has mappings without an end alone, which is too long for a machine that goes away",
    728: "it has no port left",
}
_FOR_LONG = {606, 725}


@attrs.frozen
class HttpRequest:
    """To a TCP port of the gateway."""

    port: int
    data: bytes


@attrs.define
class UpnpMapper:
    """One UDP port at one gateway.

    client: our own IPv4 address towards the gateway; gateway: its IPv4 address; port: ours;
    public_only: whether an outer address that is private itself is of no use. external: where
    peers come in; problem: what the gateway lacks if there is no such address, in words.
    """

    client: str
    gateway: str
    port: int
    random: random.Random
    public_only: bool = True
    external: Address | None = None
    problem: str = ""
    done: bool = False
    _step: _Step | None = None
    _due: bool = False
    _attempts: int = 0
    _next_at: float = math.inf
    _location: wire.Url | None = None
    _services: Sequence[wire.Service] = ()
    _stale: bool = False  # what is known of the gateway is to be found out anew
    _any: bool = True  # AddAnyPortMapping is known there
    _looks: bool = True  # GetSpecificPortMappingEntry is
    _asked_port: int = 0
    _other_ports: int = 0
    _granted: Address | None = None
    _outer_host: str = ""
    _expires_at: float = math.inf
    _renew_at: float = math.inf

    def start(self, now: float) -> None:
        """Begin to ask."""
        self._asked_port, self._other_ports = self.port, 0
        self._begin(_Step.SEARCH, now)

    def stop(self, now: float) -> None:
        """Delete the mapping; `done` follows, at the latest after some seconds."""
        if self._granted is None and self._step not in {_Step.MAP, _Step.MAP_ANY}:
            self._end()
        else:
            self.external = None
            self._begin(_Step.DELETE, now)

    def get_timer(self) -> float | None:
        """When `handle_timer` is due."""
        if self.done:
            return None
        at = min(self._next_at, self._expires_at)
        return None if at == math.inf else at

    def handle_timer(self, now: float) -> None:
        """Ask again, look, renew, or give up what was not renewed."""
        if now >= self._expires_at:
            self._lose()
            self.problem = "it has not renewed the mapping"
        if now < self._next_at:
            return
        if self._step is _Step.SEARCH:
            self._search_again(now)
        elif self._step is not None:
            self.failed(now)
        elif self._stale or not self._services:
            self._begin(_Step.SEARCH, now)
        else:
            self._begin(_Step.ADDRESS, now)

    def datagrams_to_send(self, now: float) -> list[bytes]:
        """What goes to all gateways of the network now."""
        if not self._due or self._step is not _Step.SEARCH:
            return []
        self._due = False
        self._attempts += 1
        self._next_at = now + SEARCH_TIME
        return [wire.build_search()]

    def request_to_send(self, now: float) -> HttpRequest | None:
        """What goes to the gateway now, over a connection of its own."""
        step = self._step
        if not self._due or step is None or step is _Step.SEARCH:
            return None
        self._due = False
        self._attempts += 1
        self._next_at = now + REQUEST_TIME
        if step is _Step.DESCRIBE:
            assert self._location is not None, "a search has found it"
            data = wire.build_description_request(self.gateway, self._location)
            return HttpRequest(self._location.port, data)
        service = self._services[0]
        data = wire.build_action(self.gateway, service, step.value, self._values(step))
        return HttpRequest(service.control.port, data)

    def receive_datagram_untrusted(self, data: Buffer, source: Address, now: float) -> None:
        """What came to the socket that searches. Raises RemoteProtocolError for what is no answer
        of the gateway's; it changes nothing then."""
        if source[0] != self.gateway:
            raise RemoteProtocolError(f"an answer to a search from {source[0]}, not the gateway")
        if self._step is _Step.SEARCH:
            self._location = wire.parse_search_answer_untrusted(data, self.gateway)
            self._begin(_Step.DESCRIBE, now)

    def receive_response_untrusted(self, data: Buffer, now: float, *, ended: bool) -> bool:
        """All that came over the connection so far; whether it was enough. ended: there is no
        more. Raises RemoteProtocolError; it changes nothing then, and the caller says `failed`."""
        response = parse_response_untrusted(data, ended=ended)
        if response is None:
            return False
        step = self._step
        if step is _Step.DESCRIBE:
            self._described(response, now)
        elif step is not None and step is not _Step.SEARCH:
            answer = wire.parse_action_answer_untrusted(response, step.value)
            if isinstance(answer, wire.Fault):
                self._refused(step, answer.code, now)
            else:
                self._answered(step, answer, now)
        return True

    def failed(self, now: float) -> None:
        """A request was not answered, or not as it should."""
        if self._step in {None, _Step.SEARCH}:
            return
        if self._attempts < REQUESTS:
            self._due, self._next_at = True, math.inf
        elif self._step is _Step.DELETE:
            self._end()
        elif self._granted is not None and not self._stale:
            self._stale = True  # it may have started anew, at another port
            self._begin(_Step.SEARCH, now)
        else:
            self._stale = True
            self._rest(now, SHORTEST_REST, "it does not answer as UPnP wants it")

    def _begin(self, step: _Step, now: float) -> None:
        self._step, self._due, self._attempts, self._next_at = step, True, 0, now

    def _search_again(self, now: float) -> None:
        if self._attempts < SEARCHES:
            self._due, self._next_at = True, math.inf
        else:
            self._rest(now, REST, "it does not offer it")

    def _values(self, step: _Step) -> Mapping[str, object]:
        if step is _Step.ADDRESS:
            return {}
        key = {
            "NewRemoteHost": "",
            "NewExternalPort": self._asked_port,
            "NewProtocol": "UDP",
        }
        if step in {_Step.LOOK, _Step.DELETE}:
            return key
        return {
            **key,
            "NewInternalPort": self.port,
            "NewInternalClient": self.client,
            "NewEnabled": 1,
            "NewPortMappingDescription": _DESCRIPTION,
            "NewLeaseDuration": LIFETIME,
        }

    def _described(self, response: Response, now: float) -> None:
        assert self._location is not None, "it was asked for there"
        services = wire.parse_services_untrusted(response, self._location, self.gateway)
        if services:
            self._services, self._stale = services, False
            self._begin(_Step.ADDRESS, now)
        else:
            self._rest(now, REST, "its description names no service that could")

    def _answered(self, step: _Step, values: Mapping[str, str], now: float) -> None:
        match step:
            case _Step.ADDRESS:
                self._addressed(values.get("NewExternalIPAddress", ""), now)
            case _Step.MAP:
                self._mapped(now)
            case _Step.MAP_ANY:
                self._asked_port = _number_untrusted(values.get("NewReservedPort", ""), 0xFFFF)
                self._mapped(now)
            case _Step.LOOK:
                host, port = values.get("NewInternalClient"), values.get("NewInternalPort")
                if (host, port) == (self.client, str(self.port)):
                    self._wait_mapped(now)
                else:
                    self._take_other_port(now)
            case _:
                self._end()

    def _refused(self, step: _Step, code: int, now: float) -> None:
        words = _WORDS.get(code, f"error {code}")
        seconds = LONGEST_REST if code in _FOR_LONG else REST
        if step is _Step.DELETE:
            self._end()
        elif step is _Step.ADDRESS and len(self._services) > 1:
            # Of several connections only one is in use.
            self._services = self._services[1:]
            self._begin(_Step.ADDRESS, now)
        elif step is _Step.ADDRESS:
            self._stale = True  # next time all of them again
            self._rest(now, seconds, words)
        elif step is _Step.LOOK:
            self._looks = self._looks and code == _NO_SUCH_ENTRY
            if self._looks:
                self._begin_map(now)
            else:
                self._wait_mapped(now)
        elif step is _Step.MAP_ANY and code in {_INVALID_ACTION, _NOT_IMPLEMENTED}:
            self._any = False
            self._begin_map(now)
        elif code in {_CONFLICT, _CONFLICT_WITH_OTHERS}:
            self._take_other_port(now)
        else:
            self._rest(now, seconds, words)

    def _addressed(self, text: str, now: float) -> None:
        try:
            host = str(ipaddress.IPv4Address(text))
        except ValueError:
            self._refused(_Step.ADDRESS, 501, now)
            return
        if why := unusable((host, self._asked_port), public_only=self.public_only):
            self._lose()
            self._rest(now, REST, why)
            return
        moved, self._outer_host = self._outer_host != host, host
        if self._granted is None or moved or now >= self._renew_at:
            self._begin_map(now)
        elif self._looks:
            self._begin(_Step.LOOK, now)
        else:
            self._wait_mapped(now)

    def _begin_map(self, now: float) -> None:
        newest = self._services[0].kind == wire.SERVICES[0]
        self._begin(_Step.MAP_ANY if newest and self._any else _Step.MAP, now)

    def _take_other_port(self, now: float) -> None:
        """The port outside is another's."""
        self._lose()
        self._other_ports += 1
        if self._other_ports > OTHER_PORTS:
            self._asked_port, self._other_ports = self.port, 0
            self._rest(now, REST, "the ports outside that we asked for are taken")
        else:
            self._asked_port = self.random.randrange(*_DYNAMIC_PORTS)
            self._begin_map(now)

    def _mapped(self, now: float) -> None:
        self._granted = self.external = (self._outer_host, self._asked_port)
        self._expires_at = now + LIFETIME
        self._renew_at = now + LIFETIME * self.random.uniform(*RENEWAL_SHARE)
        self._other_ports = 0
        self._wait_mapped(now)

    def _wait_mapped(self, now: float) -> None:
        self.problem = ""
        self._step, self._due = None, False
        self._next_at = min(max(self._renew_at, now), now + LOOK_INTERVAL)

    def _rest(self, now: float, seconds: float, problem: str) -> None:
        """Leave the gateway alone. A mapping that lives goes on until its end."""
        self._step, self._due = None, False
        self._next_at = now + (seconds if self._granted is None else SHORTEST_REST)
        self.problem = problem

    def _lose(self) -> None:
        self.external = self._granted = None
        self._expires_at = self._renew_at = math.inf

    def _end(self) -> None:
        self._lose()
        self.done, self._step, self._due, self._next_at = True, None, False, math.inf


def _number_untrusted(text: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) <= most):
        raise RemoteProtocolError("a port mapping without a port")
    return int(text)
