"""Whether the host's packets to a service go into the tunnel, by the host's own routes."""

import ipaddress
import socket


def source_obstacle(address: ipaddress.IPv4Address, own: ipaddress.IPv4Address) -> str:
    """What stands in the way, in words; empty if nothing does.

    Connecting a UDP socket sends nothing, and has the kernel choose the route and the source.
    own: our tunnel address, which packets into the tunnel come from.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect((str(address), 9))  # discard; nothing is sent
        except OSError as error:
            return f"this machine has no route to {address}: {error.strerror}"
        source = str(probe.getsockname()[0])
    if source == str(own):
        return ""
    return f"this machine's packets to {address} leave from {source}, not into the tunnel ({own})"
