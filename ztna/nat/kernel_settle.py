"""Know when packets of the kernel's laboratory have arrived: by an event, not by waiting for long.

A packet that crosses a veth waits in the backlog of the CPU that sent it, and so does one to the
loopback interface: one queue a CPU, first in, first out. So a datagram that we send to ourselves on
a CPU comes back after all that waited there has made its next hop; as many datagrams, one after the
other, as a packet can have hops, and it has arrived or is lost. What a link delays waits elsewhere,
and is asked for in `kernel_link`.
"""

import os

from ztna.nat.netns import Namespace

# Our choice: there and back through three NATs behind each other, with ARP on every link.
_HOPS = 40
_DEADLINE = 5.0  # s; it takes microseconds, on a busy machine some milliseconds


def flush_backlogs(namespace: Namespace) -> None:
    """Return when every packet that was sent on any CPU has arrived, is lost, or waits in a queue
    of a link. The datagrams to ourselves are sent in the namespace, on the calling thread."""
    cpus = os.sched_getaffinity(0)
    with namespace.open_socket() as udp:
        udp.settimeout(_DEADLINE)
        udp.bind(("127.0.0.1", 0))
        udp.connect(udp.getsockname())
        try:
            for cpu in cpus:
                os.sched_setaffinity(0, {cpu})
                for _ in range(_HOPS):
                    udp.send(b"")
                    udp.recv(1)
        finally:
            os.sched_setaffinity(0, cpus)
