"""Asks a gateway for one mapped UDP port, and keeps it: PCP, and NAT-PMP where PCP is not known.

Of IPv6 there is PCP alone: the same request opens a pinhole in a firewall, and `external` is then
our own address (RFC 6887 section 11.1).

`PortMapper` knows no socket. Its caller sends `datagrams_to_send` to the gateway's port 5351 from
the host's own address, gives it what comes back (`receive_untrusted`), says when nobody listens
there (`refused`), and calls `handle_timer` at `get_timer`. `external` is the address at which peers
may be told to come in; `problem` says in words why there is none.

    PCP MAP -> mapped (silence, or a version it does not know: NAT-PMP)
    NAT-PMP address -> NAT-PMP map -> mapped (silence: rest, then PCP again)
    mapped: a look every minute, which finds a gateway that has lost its mappings (its epoch) or has
    another address; asked anew at half of the lifetime; `stop` deletes it

What an answer must be to count: from the gateway, for our port, and by PCP with our nonce, which
nobody outside of the path can know (RFC 6887 section 18.1).
"""

import enum
import ipaddress
import math
import random

import attrs

from ztna.core import portmap_messages as wire
from ztna.core.ice.candidate import CandidateRules, is_private
from ztna.core.portmap_epoch import Epoch
from ztna.core.ports import Address, Buffer
from ztna.errors import RemoteProtocolError

# Our choice, s: a tenth of what RFC 6886 section 3.3 recommends, so that the mapping of a machine
# that was switched off is not open for long.
LIFETIME = 720
LOOK_INTERVAL = 60.0  # s; our choice
REST = 600.0  # s until a gateway that did not answer is asked again; our choice
# RFC 6887 section 7.4 has errors of 30 s and of 30 min; nobody makes us wait shorter or longer.
SHORTEST_REST, LONGEST_REST = 30.0, 1800.0
# RFC 6887 section 11.2.1: renewals are no nearer to each other.
_RENEWAL_GAP = 4.0
RENEWAL_SHARE = (1 / 2, 5 / 8)  # RFC 6887 section 11.2.1

# RFC 6887 section 8.1.1: IRT 3 s, doubling, each changed by up to a tenth. It would have us ask for
# ever; after 3 we try NAT-PMP, as gateways exist that drop what they do not know.
_PCP_FIRST, _PCP_ATTEMPTS, _PCP_JITTER = 3.0, 3, 0.1
# RFC 6886 section 3.1: 250 ms, doubling, nine times: 128 s in all.
_NATPMP_FIRST, _NATPMP_ATTEMPTS = 0.25, 9
# Our choice: who stops is waited for. 1.75 s in all.
_DELETE_ATTEMPTS = 3


class MappingProtocol(enum.Enum):
    """What is spoken with the gateway. The value is for people."""

    PCP = "PCP"
    NAT_PMP = "NAT-PMP"


class _Ask(enum.Enum):
    """What an answer is awaited for."""

    ADDRESS = enum.auto()
    MAP = enum.auto()
    LOOK = enum.auto()
    DELETE = enum.auto()


_NATPMP_WORDS = {  # RFC 6886 section 3.5
    2: "it does not allow it",
    3: "it has no outer address itself",
    4: "it has no port left",
    5: "it cannot do this",
}
_PCP_WORDS = {  # RFC 6887 section 7.4
    2: "it does not allow it",
    3: "it did not understand",
    4: "it cannot do this",
    5: "it did not understand",
    6: "it did not understand",
    7: "it has no connection itself",
    8: "it has no port left",
    9: "it cannot do this for UDP",
    10: "we have too many mappings already",
    11: "it cannot give the address asked for",
    12: "another NAT is between us and it",
    13: "it has too many peers",
}
_NO_HOST = (str(ipaddress.IPv4Address(0)), str(ipaddress.IPv6Address(0)))
_FOR_LONG = {2, 5}  # of NAT-PMP: not allowed, unknown; PCP says itself how long


@attrs.define
class PortMapper:
    """One UDP port at one gateway.

    client: our own address towards the gateway, which a pinhole of IPv6 is opened for; gateway:
    its address of the same IP version, an IPv6 one with its scope; port: ours;
    random: unpredictable outside of tests, as the nonce is made of it; protocols: tried in this
    order; public_only: whether an outer address that is private itself is of no use.
    """

    client: str
    gateway: str
    port: int
    random: random.Random
    protocols: tuple[MappingProtocol, ...] = tuple(MappingProtocol)
    public_only: bool = True
    external: Address | None = None
    problem: str = ""
    done: bool = False
    _nonce: bytes = attrs.field(init=False, repr=False)
    _protocol: int = 0
    _ask: _Ask | None = None
    _attempts: int = 0
    _interval: float = 0.0
    _due: bool = False
    _next_at: float = math.inf
    _expires_at: float = math.inf
    _renew_at: float = math.inf
    _granted: Address | None = None
    _outer_host: str = ""
    _epoch: Epoch = attrs.Factory(Epoch)
    _looks: bool = True

    def __attrs_post_init__(self) -> None:
        self._nonce = self.random.randbytes(wire.NONCE_SIZE)

    @property
    def protocol(self) -> MappingProtocol:
        """What is spoken with the gateway now."""
        return self.protocols[self._protocol]

    @property
    def restarts(self) -> int:
        """How often the gateway has lost its mappings, as its epoch told."""
        return self._epoch.restarts

    def start(self, now: float) -> None:
        """Begin to ask."""
        self._protocol = 0
        self._begin(now)

    def stop(self, now: float) -> None:
        """Delete the mapping; `done` follows, at the latest after some seconds."""
        if self._granted is None and self._ask is not _Ask.MAP:
            self._end()
        else:
            self.external = None
            self._request(_Ask.DELETE, now)

    def refused(self, now: float) -> None:
        """The gateway says by ICMP that nobody listens at the port, for neither protocol."""
        if self._ask is _Ask.DELETE:
            self._end()
        elif self._granted is None and self._ask is not None:
            self._rest(now, REST, "it does not offer port mappings")
        # Else its server may just be starting anew: the timers go on.

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
            self.problem = self._words("it has not renewed the mapping")
        if now < self._next_at:
            return
        if self._ask is not None:
            if self._attempts < self._allowed_attempts:
                self._due, self._next_at = True, math.inf
            else:
                self._silence(now)
        elif self._granted is None:
            self.start(now)
        elif now >= self._renew_at:
            self._begin(now)
        else:
            self._request(_Ask.LOOK, now)

    def datagrams_to_send(self, now: float) -> list[bytes]:
        """What goes to the gateway now."""
        if not self._due or self._ask is None:
            return []
        self._due = False
        self._attempts += 1
        jitter = 1 + self.random.uniform(-_PCP_JITTER, _PCP_JITTER) * self._is_pcp
        self._next_at = now + self._interval * jitter
        self._interval *= 2
        return [self._pcp_request(self._ask) if self._is_pcp else self._natpmp_request(self._ask)]

    def receive_untrusted(self, data: Buffer, source: Address, now: float) -> None:
        """What came to the socket that asks. Raises RemoteProtocolError for what is no answer of
        the gateway's to us; it changes nothing then."""
        if source != (self.gateway, wire.SERVER_PORT):
            raise RemoteProtocolError(f"answer about a port mapping from {source[0]}, a stranger")
        response = wire.parse_response_untrusted(data)
        if self.done:
            return
        if isinstance(response, wire.PcpResponse):
            if self._is_pcp:
                self._pcp(response, now)
        elif self._is_pcp:
            # RFC 6887 appendix A: a gateway with NAT-PMP alone answers so.
            self._unknown_version(now)
        elif isinstance(response, wire.NatPmpAddress):
            self._natpmp_address(response, now)
        elif isinstance(response, wire.NatPmpMapping):
            self._natpmp_mapping(response, now)
        else:
            self._unknown_version(now)

    @property
    def _is_pcp(self) -> bool:
        return self.protocol is MappingProtocol.PCP

    @property
    def _allowed_attempts(self) -> int:
        if self._ask is _Ask.DELETE:
            return _DELETE_ATTEMPTS
        return _PCP_ATTEMPTS if self._is_pcp else _NATPMP_ATTEMPTS

    def _begin(self, now: float) -> None:
        self._request(_Ask.MAP if self._is_pcp else _Ask.ADDRESS, now)

    def _request(self, ask: _Ask, now: float) -> None:
        self._ask, self._attempts, self._due, self._next_at = ask, 0, True, now
        quick = not self._is_pcp or ask is _Ask.DELETE
        self._interval = _NATPMP_FIRST if quick else _PCP_FIRST

    def _pcp_request(self, ask: _Ask) -> bytes:
        if ask is _Ask.LOOK:
            return wire.build_pcp_announce(self.client)
        lifetime = 0 if ask is _Ask.DELETE else LIFETIME
        # RFC 6887 section 11.1: all zeros is no wish.
        suggested = self._granted or (_NO_HOST[":" in self.client], self.port)
        return wire.build_pcp_map(self.client, self._nonce, self.port, lifetime, suggested)

    def _natpmp_request(self, ask: _Ask) -> bytes:
        if ask is _Ask.MAP:
            suggested = self.port if self._granted is None else self._granted[1]
            return wire.build_natpmp_map(self.port, LIFETIME, suggested)
        if ask is _Ask.DELETE:  # RFC 6886 section 3.4: the suggestion is 0 too
            return wire.build_natpmp_map(self.port, 0)
        return wire.build_natpmp_address()

    def _pcp(self, response: wire.PcpResponse, now: float) -> None:
        mapping = response.mapping
        if response.opcode not in {wire.OP_ANNOUNCE, wire.OP_MAP}:
            raise RemoteProtocolError(f"PCP answer of opcode {response.opcode}, never asked for")
        if mapping is not None:
            ours = (self._nonce, wire.UDP, self.port)
            if (mapping.nonce, mapping.protocol, mapping.port) != ours:
                raise RemoteProtocolError("PCP answer about a mapping that is not ours")
        if response.result == wire.UNSUPPORTED_VERSION:
            self._unknown_version(now)
        elif response.opcode == wire.OP_ANNOUNCE:
            self._looks = self._looks and response.result == wire.SUCCESS
            lost = self._looks and self._epoch.lost_state(response.epoch, now)
            self._looked(now, again=lost)
        elif self._ask is _Ask.DELETE:
            if response.lifetime == 0 or response.result != wire.SUCCESS:
                self._end()
        elif response.result != wire.SUCCESS:
            if self._ask is _Ask.MAP:
                words = _PCP_WORDS.get(response.result, f"error {response.result}")
                self._rest(now, response.lifetime, words)
        else:
            assert mapping is not None  # the parser takes no success without
            # After a loss of state this very answer says what is mapped anew.
            self._epoch.lost_state(response.epoch, now)
            self._mapped(mapping.external, response.lifetime, now)

    def _natpmp_address(self, response: wire.NatPmpAddress, now: float) -> None:
        if response.result != wire.SUCCESS:
            if self._ask is _Ask.ADDRESS:
                self._natpmp_error(response.result, now)
            return
        lost = self._epoch.lost_state(response.epoch, now)
        moved, self._outer_host = self._outer_host != response.host, response.host
        if self._ask is _Ask.ADDRESS:
            self._request(_Ask.MAP, now)
        else:
            self._looked(now, again=lost or moved)

    def _natpmp_mapping(self, response: wire.NatPmpMapping, now: float) -> None:
        if response.port != self.port and response.result == wire.SUCCESS:
            raise RemoteProtocolError("NAT-PMP answer about a mapping that is not ours")
        if self._ask is _Ask.DELETE:
            if response.lifetime == 0 or response.result != wire.SUCCESS:
                self._end()
        elif self._ask is _Ask.MAP:
            if response.result != wire.SUCCESS:
                self._natpmp_error(response.result, now)
            else:
                self._epoch.lost_state(response.epoch, now)
                external = (self._outer_host, response.external_port)
                self._mapped(external, response.lifetime, now)

    def _natpmp_error(self, result: int, now: float) -> None:
        seconds = LONGEST_REST if result in _FOR_LONG else SHORTEST_REST
        self._rest(now, seconds, _NATPMP_WORDS.get(result, f"error {result}"))

    def _looked(self, now: float, *, again: bool) -> None:
        """The gateway has told its epoch. again: its mappings are lost."""
        if self._granted is not None and again and self._ask is not _Ask.DELETE:
            self._begin(now)
        elif self._ask is _Ask.LOOK:
            self._wait_mapped(now)

    def _mapped(self, external: Address, lifetime: float, now: float) -> None:
        if lifetime == 0:
            # RFC 6887 section 15: the gateway has taken it away.
            self._lose()
            self._rest(now, SHORTEST_REST, "it has ended the mapping")
            return
        self._granted = external
        self._expires_at = now + lifetime
        self._renew_at = now + lifetime * self.random.uniform(*RENEWAL_SHARE)
        why = unusable(external, public_only=self.public_only)
        self.external, self.problem = (None, self._words(why)) if why else (external, "")
        self._wait_mapped(now)

    def _wait_mapped(self, now: float) -> None:
        self._ask, self._due = None, False
        look_at = now + LOOK_INTERVAL if self._looks else math.inf
        self._next_at = min(self._renew_at, look_at)

    def _silence(self, now: float) -> None:
        """The gateway has not answered, however often it was asked."""
        if self._ask is _Ask.DELETE:
            self._end()
        elif self._granted is not None:
            # It lives on, as far as we know: asked anew until it would end.
            self._ask, self._due = None, False
            left = (self._expires_at - now) / 2
            self._renew_at = self._next_at = now + max(_RENEWAL_GAP, left)
        else:
            self._next_protocol(now, "it does not answer")

    def _unknown_version(self, now: float) -> None:
        if self._ask is _Ask.DELETE:
            self._end()
        elif self._ask is not None:
            self._lose()
            self._next_protocol(now, "it speaks another version")

    def _next_protocol(self, now: float, problem: str) -> None:
        if self._protocol + 1 < len(self.protocols):
            self._protocol += 1
            self._begin(now)
        else:
            self._rest(now, REST, problem)

    def _rest(self, now: float, seconds: float, problem: str) -> None:
        """Leave the gateway alone. A mapping that lives goes on until its end."""
        self._ask, self._due = None, False
        self.problem = self._words(problem)
        self._next_at = now + min(max(seconds, SHORTEST_REST), LONGEST_REST)
        self._renew_at = self._next_at

    def _lose(self) -> None:
        self.external = self._granted = None
        self._expires_at = self._renew_at = math.inf

    def _end(self) -> None:
        self._lose()
        self.done, self._ask, self._due, self._next_at = True, None, False, math.inf

    def _words(self, why: str) -> str:
        return f"the gateway {self.gateway} maps no port: {why}"


def unusable(external: Address, *, public_only: bool) -> str:
    """Why peers cannot come in at this address; empty if they can."""
    if why := CandidateRules().forbidden(external):
        return f"the outer address that it names is of no use ({why})"
    if public_only and is_private(ipaddress.ip_address(external[0])):
        return f"its own outer address is {external[0]}, so another NAT is above it"
    return ""
