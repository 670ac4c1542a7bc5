"""A STUN server without sockets: what to answer to a request, and from which address.

A payload's way: `StunServer.receive_untrusted` -> limits -> `parse_stun_untrusted` -> refusals
(400, 401, 420) or a Binding response with what RFC 5780 adds -> `StunReply`, which the caller sends
from the socket that `StunReply.end` names. Old clients (RFC 3489) get what they understand.

The server keeps no state about a client but its rate, and knows no passwords. It is no amplifier:
a response is at most MAX_GROWTH bytes longer than its request, whatever the request asks for, and
goes to the address that the request came from, or to another port of it.
"""

import collections
from collections.abc import Mapping

import attrs

from ztna.core.limits import SourceLimiter
from ztna.core.ports import Address, Buffer
from ztna.core.stun.attributes import (
    ChangedAddress,
    ChangeRequest,
    Error,
    ErrorCode,
    Fingerprint,
    MappedAddress,
    OtherAddress,
    Padding,
    ResponseOrigin,
    ResponsePort,
    SourceAddress,
    UnknownAttributes,
    Username,
    XorMappedAddress,
)
from ztna.core.stun.messages import (
    BINDING,
    MessageClass,
    StunMessage,
    build_stun_message,
    parse_stun_untrusted,
)
from ztna.core.stun.values import AnyAttribute
from ztna.errors import LocalProtocolError, RemoteProtocolError

MAX_GROWTH = 96
"""Bytes by which a response may be longer than its request: four IPv6 addresses, which answer an
empty request of 20 bytes. With IPv4 it is half of that."""

# RFC 5780 section 6.1 lets PADDING fill the MTU; we fill up to the request's own size and no
# further, so that it cannot be used to reflect more than was sent. Still more than one Ethernet
# frame, since fragments are what PADDING is to try.
MAX_PADDED = 2048

# Our choice: a full NAT probe sends some 20 requests, its retransmissions included, and several
# clients may share an address behind a carrier's NAT.
SOURCE_RATE = 50.0
SOURCE_BURST = 100.0


@attrs.frozen(slots=True)
class LocalEnd:
    """Which of the server's addresses: primary or alternate IP address, primary or alternate
    port."""

    alternate_ip: bool = False
    alternate_port: bool = False

    def changed(self, request: ChangeRequest) -> "LocalEnd":
        """The end that a response must leave from (RFC 5780 section 6.1, table 1)."""
        return LocalEnd(
            self.alternate_ip != request.change_ip, self.alternate_port != request.change_port
        )


@attrs.frozen(slots=True)
class StunReply:
    """A response, the end to send it from, and where it goes."""

    data: bytes = attrs.field(repr=bytes.hex)
    end: LocalEnd
    destination: Address


@attrs.define
class StunServer:
    """Answers Binding requests at one IP address or two, one port or two.

    Clients of another IP version than the primary address's, where the caller's port carries both,
    are answered as by a server of that one address: the second one would be of no use to them.

    primary: address and port as clients see them, also behind a one-to-one NAT.
    alternate_ip, alternate_port: what RFC 5780 tests need. With both, all four ends must be
    served, and OTHER-ADDRESS is sent. With the port alone, 'change port' works and OTHER-ADDRESS
    is left out, as RFC 5780 section 7.4 wants it: our choice, as it still tells
    address-and-port-dependent behaviour from the rest.
    """

    primary: Address
    alternate_ip: str | None = None
    alternate_port: int | None = None
    limiter: SourceLimiter = attrs.field(factory=lambda: SourceLimiter(SOURCE_RATE, SOURCE_BURST))
    _counts: collections.Counter[str] = attrs.field(factory=collections.Counter, init=False)

    def ends(self) -> dict[LocalEnd, Address]:
        """The ends that the caller must open a socket for, and their addresses."""
        hosts = {False: self.primary[0], True: self.alternate_ip}
        ports = {False: self.primary[1], True: self.alternate_port}
        return {
            LocalEnd(other_ip, other_port): (host, port)
            for other_ip, host in hosts.items()
            if host is not None
            for other_port, port in ports.items()
            if port is not None
        }

    def statistics(self) -> Mapping[str, int]:
        """What became of the payloads: `answered`, `error_420` and so on, and why the others were
        dropped."""
        return dict(self._counts)

    def receive_untrusted(
        self, data: Buffer, source: Address, end: LocalEnd, now: float
    ) -> StunReply | None:
        """Answer one UDP payload that came from `source` to `end`. None: no answer, but counted.

        What is no request of ours is dropped and not raised: the port is shared. Raises
        LocalProtocolError for an end that this server does not have.
        """
        ends = self.ends()
        if end not in ends:
            raise LocalProtocolError(f"this STUN server has no {end}")
        request = self._admit_untrusted(data, source, now)
        if isinstance(request, str):
            self._counts[request] += 1
            return None
        if (":" in source[0]) != (":" in self.primary[0]) and not end.alternate_ip:
            ends = {each: address for each, address in ends.items() if not each.alternate_ip}
        return self._refuse(request, source, end, ends) or self._answer(request, source, end, ends)

    def _admit_untrusted(self, data: Buffer, source: Address, now: float) -> StunMessage | str:
        """The request, or why there is nothing to answer."""
        if source[1] == 0:
            return "no_source_port"
        if not self.limiter.allow(source[0], now):
            return "limited"
        try:
            message = parse_stun_untrusted(data)
        except RemoteProtocolError:
            return "malformed"
        wanted = message.message_class is MessageClass.REQUEST and message.method == BINDING
        return message if wanted else "not_a_binding_request"

    def _refuse(
        self,
        request: StunMessage,
        source: Address,
        end: LocalEnd,
        ends: Mapping[LocalEnd, Address],
    ) -> StunReply | None:
        """The error response, where the request deserves one. ends: those of use to the client."""
        unknown = list(request.unknown_required)
        change = request.find(ChangeRequest)
        if change is not None and end.changed(change) not in ends:
            # RFC 5780 section 6.1: a server without the alternate does not know the attribute.
            unknown.append(ChangeRequest.kind)
        port = request.find(ResponsePort)
        if unknown:
            error = ErrorCode(Error.UNKNOWN_ATTRIBUTE, "Unknown Attribute")
        elif request.find(Username) is not None or request.signatures:
            # An ICE check, sent to the wrong address: an unsigned answer would not help it.
            error = ErrorCode(Error.UNAUTHENTICATED, "Unauthenticated")
        elif port is not None and (port.port == 0 or request.find(Padding) is not None):
            # RFC 5780 section 6.1; and nobody has port 0.
            error = ErrorCode(Error.BAD_REQUEST, "Bad Request")
        else:
            return None
        if request.is_old and len(unknown) % 2:
            # RFC 3489 section 11.2.10: a multiple of four bytes, by saying one type twice.
            unknown.append(unknown[-1])
        types = (UnknownAttributes(tuple(unknown)),) if unknown else ()
        self._counts[f"error_{error.code}"] += 1
        return self._reply(MessageClass.ERROR, request, (error, *types), end, source)

    def _answer(
        self,
        request: StunMessage,
        source: Address,
        end: LocalEnd,
        ends: Mapping[LocalEnd, Address],
    ) -> StunReply:
        change = request.find(ChangeRequest)
        leaves = end if change is None else end.changed(change)
        attributes: list[AnyAttribute]
        if request.is_old:
            attributes = [MappedAddress(source), SourceAddress(ends[leaves])]
        else:
            # RFC 5780 section 6.1 wants both: a NAT that rewrites one betrays itself.
            attributes = [
                XorMappedAddress(source),
                MappedAddress(source),
                ResponseOrigin(ends[leaves]),
            ]
        other = ends.get(end.changed(ChangeRequest(change_ip=True, change_port=True)))
        if other is not None:
            attributes.append((ChangedAddress if request.is_old else OtherAddress)(other))
        port = request.find(ResponsePort)
        self._counts["answered"] += 1
        return self._reply(
            MessageClass.SUCCESS,
            request,
            tuple(attributes),
            leaves,
            source if port is None else (source[0], port.port),
        )

    def _reply(
        self,
        message_class: MessageClass,
        request: StunMessage,
        attributes: tuple[AnyAttribute, ...],
        end: LocalEnd,
        destination: Address,
    ) -> StunReply:
        fingerprint = request.find(Fingerprint) is not None

        def build(*more: AnyAttribute) -> bytes:
            message = StunMessage(message_class, request.transaction_id, attributes + more)
            return build_stun_message(message, fingerprint=fingerprint)

        data = build()
        if message_class is MessageClass.SUCCESS and request.find(Padding) is not None:
            room = min(len(request.encoded), MAX_PADDED) - len(build(Padding(0)))
            if room > 0:
                data = build(Padding(room))
        return StunReply(data, end, destination)
