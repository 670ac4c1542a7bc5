"""A datagram of a flow becomes IP packets: one, or as many fragments as the tunnel needs.

Both ends of the tunnel make them: the connector of backends' answers (`core.flows`), the userspace
host of local programs' datagrams (`core.outbound`).
"""

import secrets

import attrs

from ztna.core.packet.fragments import fragment
from ztna.core.packet.ip import IPV4_HEADER_SIZE, IPV6_HEADER_SIZE
from ztna.core.packet.udp import UDP_HEADER_SIZE, build_udp_packet
from ztna.core.ports import Buffer

# What UDP over IPv4 holds (RFC 768, RFC 791); a backend over IPv6 can send 20 bytes more.
MAX_DATAGRAM = 65_507


@attrs.define
class DatagramBuilder:
    """Builds the packets, and counts their identifications. atomic: nothing on the way has to cut
    what is at most packet_size."""

    atomic: bool = True
    # RFC 7739 section 3: not to be guessed by others.
    _identification: int = attrs.Factory(lambda: secrets.randbits(32))

    def packets(
        self,
        source: tuple[bytes, int],
        destination: tuple[bytes, int],
        payload: Buffer,
        packet_size: int,
    ) -> list[bytes]:
        """Packets of at most packet_size bytes with one datagram. source, destination: packed
        address and port. payload: at most `MAX_DATAGRAM` bytes.

        RFC 6864 section 4: what may be cut has an identification of its own, by which the fragments
        of one flow are told apart for as long as they live; what is atomic needs none.
        """
        header_size = IPV4_HEADER_SIZE if len(source[0]) == 4 else IPV6_HEADER_SIZE
        whole = header_size + UDP_HEADER_SIZE + len(payload) <= packet_size
        dont_fragment = whole and self.atomic
        if not dont_fragment:
            self._identification = (self._identification + 1) & 0xFFFF_FFFF
        packet = build_udp_packet(
            source[0],
            destination[0],
            source[1],
            destination[1],
            payload,
            identification=0 if dont_fragment else self._identification & 0xFFFF,
            dont_fragment=dont_fragment,
        )
        if whole:
            return [packet]
        return fragment(packet, packet_size, identification=self._identification)
