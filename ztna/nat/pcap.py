"""Write UDP batches of the laboratory in memory as a pcap file that wireshark and tcpdump read.

pcap 2.4 (draft-ietf-opsawg-pcap section 4), microseconds, LINKTYPE_RAW: IP packets without a frame.
"""

import ipaddress
import struct
from typing import BinaryIO

import attrs

from ztna.core.packet.udp import build_udp_packet
from ztna.nat.link import WireBatch

_LARGEST_PACKET = 65_535
_LINKTYPE_RAW = 101
_FILE_HEADER = struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, _LARGEST_PACKET, _LINKTYPE_RAW)


@attrs.define(eq=False)
class PcapWriter:
    """Writes to a file that the caller opened, and closes."""

    file: BinaryIO

    def __attrs_post_init__(self) -> None:
        self.file.write(_FILE_HEADER)

    def write(self, batch: WireBatch, now: float) -> None:
        """Add each payload of a batch as an IP packet of its own. now: s."""
        (source, source_port), (destination, destination_port) = batch.source, batch.destination
        for payload in batch.segments():
            packet = build_udp_packet(
                ipaddress.ip_address(source).packed,
                ipaddress.ip_address(destination).packed,
                source_port,
                destination_port,
                payload,
            )
            at = int(now * 1_000_000)
            header = struct.pack("=IIII", *divmod(at, 1_000_000), len(packet), len(packet))
            self.file.write(header + packet)
