"""The answer to a packet for a port where there is no service, so that no program waits.

TCP gets a reset, as from a host where nothing listens (RFC 9293 section 3.10.7.1); everything else
gets an ICMP error that says it is administratively prohibited. Who makes such answers keeps to a
rate.
"""

from ztna.core.limits import KeyedLimiter
from ztna.core.packet.icmp import build_prohibited
from ztna.core.packet.ip import TCP, parse_ip_untrusted
from ztna.core.ports import Buffer, IpPacket
from ztna.core.tcp.segment import (
    reset_for,
    segment_from_packet_untrusted,
    segments_to_packets,
)
from ztna.errors import RemoteProtocolError

# RFC 4443 section 2.4 (f): the rate of ICMPv6 errors must be limited; RFC 1812 section 4.3.2.8 says
# so of ICMP. Our choice for each who gets them, a second and at once: as many as SYNs are looked at
# (`core.flow_shares`), so that no program waits that does what programs do. Resets count as well.
ERROR_RATE = 256.0
ERROR_BURST = 1024.0
# Users whose rate a connector remembers: as many as there may be flows.
MAX_ERROR_SOURCES = 8192


def error_limiter() -> KeyedLimiter:
    """The rate of each user of a connector, by packed address."""
    return KeyedLimiter(ERROR_RATE, ERROR_BURST, MAX_ERROR_SOURCES)


def refuse(packet: IpPacket) -> Buffer | None:
    """A whole IP packet that refuses the given one; None where nothing may answer it."""
    try:
        ip = parse_ip_untrusted(packet.data)
        if ip.protocol != TCP or ip.fragment is not None:
            return build_prohibited(packet.data)
        (source_port, destination_port), segment = segment_from_packet_untrusted(packet, ip)
    except RemoteProtocolError:
        return None
    reset = reset_for(segment)
    if reset is None:
        return None
    (answer,) = segments_to_packets(
        [reset],
        source=ip.destination,
        destination=ip.source,
        source_port=destination_port,
        destination_port=source_port,
    )
    return answer.data
