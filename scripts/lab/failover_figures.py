"""Relay against direct path on one network: round trip and throughput, one behind the other."""

import os
import socket
import time

import attrs

from scripts.lab.deployment import NotReadyError
from scripts.lab.failover_probes import Stream
from scripts.lab.failover_site import FailoverSite
from scripts.lab.recovery_probes import wall_clock
from scripts.lab.recovery_site import FILES

_FILE_BYTES = 1 << 30  # more than one connection brings in the time
_STREAM_SECONDS = 5.0
_TCP_SECONDS, _TCP_WARM = 12.0, 4.0
_SETTLE = 2.0  # s
_DEADLINE = 90.0  # s
_PIECE = 1 << 20


@attrs.frozen
class Figures:
    """round trips: s, median and p95, of 200 bytes; rates: bit/s of one TCP connection, without its
    first seconds."""

    direct_rtt: tuple[float, float]
    direct_rate: float
    relay_rtt: tuple[float, float]
    relay_rate: float
    load: float

    def words(self) -> str:
        """A table."""
        rows = (
            ("direct", self.direct_rtt, self.direct_rate),
            ("relay", self.relay_rtt, self.relay_rate),
        )
        lines = [
            f"| {name} | {rtt[0] * 1000:.0f} | {rtt[1] * 1000:.0f} | {rate / 1e6:.1f} |"
            for name, rtt, rate in rows
        ]
        head = "| path | round trip p50 ms | p95 ms | one TCP download Mbit/s |\n|---|---|---|---|"
        return "\n".join([head, *lines, "", f"At a load of {self.load:.1f}."])


def compare(site: FailoverSite) -> Figures:
    """Measure on the direct path, cut it, and measure on the relay."""
    with (site.deployment.folder / "files/large").open("wb") as file:
        file.truncate(_FILE_BYTES)
    site.wait_direct(_DEADLINE, steady=_SETTLE)
    direct = _round_trip(site), _rate(site)
    if not site.all_direct():
        raise NotReadyError("the direct path was lost meanwhile")
    site.home.outside.block(site.office.address)
    end = time.monotonic() + _DEADLINE
    while not site.all_relayed():
        if time.monotonic() > end:
            raise NotReadyError("the relay does not carry")
        time.sleep(0.02)
    time.sleep(_SETTLE)
    relay = _round_trip(site), _rate(site)
    site.home.outside.unblock(site.office.address)
    return Figures(*direct, *relay, os.getloadavg()[0])


def _round_trip(site: FailoverSite) -> tuple[float, float]:
    with Stream(site.agent, site.apps) as stream:
        begin = wall_clock()
        time.sleep(_STREAM_SECONDS)
        times = sorted(stream.round_trips(begin, wall_clock() - 1))
    if not times:
        raise NotReadyError("no packet of the stream came back")
    return times[len(times) // 2], times[len(times) * 95 // 100]


def _rate(site: FailoverSite) -> float:
    with site.agent.namespace.open_socket(socket.AF_INET, socket.SOCK_STREAM) as tcp:
        tcp.settimeout(_DEADLINE)
        tcp.connect((FILES, 80))
        tcp.sendall(b"GET /large HTTP/1.0\r\n\r\n")
        begin = time.monotonic()
        warm_at, size = begin, 0
        while time.monotonic() - begin < _TCP_SECONDS:
            data = tcp.recv(_PIECE)
            if not data:
                raise NotReadyError("the download ended early")
            if time.monotonic() - begin < _TCP_WARM:
                warm_at = time.monotonic()
            else:
                size += len(data)
        return size * 8 / (time.monotonic() - warm_at)
