"""Sends garbage over UDP as fast as it can, for `scripts/abuse`. Stands alone: no ztna in it.

    python flood.py HOST PORT SECONDS [--spoof NETWORK]

With --spoof each datagram has a source address of that network (needs a raw socket). Prints one
line of JSON: datagrams and bytes sent.
"""

import argparse
import ipaddress
import json
import random
import socket
import struct
import sys
import time

VARIETY = 2048  # datagrams, made once and sent again and again


def garbage(source: random.Random) -> bytes:
    """Something that looks like what the port expects, or like nothing."""
    size = source.choice((0, 1, 20, 60, 300, 1200, 1250))
    noise = source.randbytes(size)
    cid = source.randbytes(8)
    initial = b"\xc3\x00\x00\x00\x01\x08" + cid + b"\x08" + cid + b"\x00\x44\x90"
    return source.choice(
        (
            noise,
            # A client's first packet that no one can decrypt; of a version nobody speaks; a token.
            initial + source.randbytes(1200),
            b"\xc3\x1a\x2a\x3a\x4a\x08" + cid + b"\x08" + cid + source.randbytes(1200),
            initial[:-3] + b"\x40\x60" + source.randbytes(1200),
            # Sessions that never were; STUN, asked for and malformed; relayed and reserved.
            b"\x40" + cid + noise,
            b"\x00\x01\x00\x00\x21\x12\xa4\x42" + source.randbytes(12),
            b"\x00\x01" + noise,
            b"\x80" + noise,
            b"\xbf" + noise,
        )
    )


def flood(host: str, port: int, seconds: float, spoof: str | None) -> dict[str, int]:
    """Send until the time is over."""
    source = random.Random(1)
    payloads = [garbage(source) for _ in range(VARIETY)]
    if spoof is None:
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.connect((host, port))
        packets = payloads
    else:
        udp = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        udp.connect((host, 0))
        network = ipaddress.IPv4Network(spoof)
        packets = [
            _datagram(network[source.randrange(1, network.num_addresses - 1)], host, port, payload)
            for payload in payloads
        ]
    sent = size = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for packet in packets:
            try:
                size += udp.send(packet)
                sent += 1
            except OSError:
                continue  # ICMP says nobody listens, or the queue is full: go on
    return {"datagrams": sent, "bytes": size}


def _datagram(source: ipaddress.IPv4Address, host: str, port: int, payload: bytes) -> bytes:
    """An IPv4 packet; the kernel fills in its checksum, and UDP's may be left out (RFC 768)."""
    size = 28 + len(payload)
    addresses = source.packed + socket.inet_aton(host)
    ip = struct.pack(">BBHHHBBH", 0x45, 0, size, 0, 0, 64, socket.IPPROTO_UDP, 0) + addresses
    return ip + struct.pack(">HHHH", 1024 + size, port, size - 20, 0) + payload


def main() -> int:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("host")
    options.add_argument("port", type=int)
    options.add_argument("seconds", type=float)
    options.add_argument("--spoof")
    given = options.parse_args()
    print(json.dumps(flood(given.host, given.port, given.seconds, given.spoof)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
