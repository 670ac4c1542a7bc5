"""What the benchmark measures through one tunnel. Every run is bounded in time.

`measure` gives a flat record of numbers; a key that is absent could not be measured.
"""

import json
import math
import os
import re
import statistics
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from scripts.lab.bench_network import IPERF_PORT, Network
from scripts.lab.bench_tunnels import Tunnel

UDP_PAYLOAD = 1_100  # bytes; fits every tunnel here without fragments
_UDP_LOSS = 1.0  # percent that a rate may lose
_UDP_STEPS = 5  # halvings of the interval between a good and a bad rate
_PINGS = 300
_PING_INTERVAL = 0.005  # s
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
# iperf3's server needs a moment between two tests: it is busy with the last one, or has closed its
# listening socket and not opened the next.
_ATTEMPTS = 20
_NOT_YET = ("busy", "Connection refused")


class MeasurementError(Exception):
    """A program of the benchmark failed; the message holds its words."""


def measure(network: Network, tunnel: Tunnel, seconds: int) -> dict[str, float]:
    """Throughput, packet rate, latency, CPU time and memory of one tunnel.

    Keys: tcp1_gbps, tcp4_gbps, udp_kpps (at less than 1 % loss), ping_p50_us, ping_p99_us, and a
    role: cpu_s_per_gb:ROLE (of the single TCP stream; 1 GB is 10^9 bytes), rss_mb:ROLE; their
    sum over the roles as cpu_s_per_gb.
    """
    figures = dict(_ping(network, tunnel.target))
    before = {role: _cpu_seconds(pid) for role, pid in tunnel.processes.items()}
    received = _tcp(network, tunnel.target, seconds, streams=1)
    figures["tcp1_gbps"] = received["bits_per_second"] / 1e9
    for role, pid in tunnel.processes.items():
        used = _cpu_seconds(pid) - before[role]
        figures[f"cpu_s_per_gb:{role}"] = used / max(received["bytes"] / 1e9, 1e-9)
    if tunnel.processes:
        figures["cpu_s_per_gb"] = sum(figures[f"cpu_s_per_gb:{role}"] for role in tunnel.processes)
    received = _tcp(network, tunnel.target, seconds, streams=4)
    figures["tcp4_gbps"] = received["bits_per_second"] / 1e9
    figures["udp_kpps"] = _udp_rate(network, tunnel.target, max(1, seconds // 3)) / 1e3
    for role, pid in tunnel.processes.items():
        figures[f"rss_mb:{role}"] = _resident(pid) / 1e6
    return figures


def _tcp(network: Network, target: str, seconds: int, streams: int) -> Mapping[str, float]:
    control = ("-C", network.congestion_control)
    end = _iperf(network, target, seconds, "-P", str(streams), *control)
    received: Mapping[str, float] = end["sum_received"]
    return received


def _udp_rate(network: Network, target: str, seconds: int) -> float:
    """Packets a second that arrive when at most 1 % is lost: halve between good and bad rates."""

    def run(rate: float) -> tuple[float, float]:
        bits = "0" if math.isinf(rate) else str(round(rate * UDP_PAYLOAD * 8))
        end = _iperf(
            network, target, seconds, "-u", "-l", str(UDP_PAYLOAD), "-w", "2M", "-b", bits
        )["sum"]
        arrived = (end["packets"] - end["lost_packets"]) / end["seconds"]
        return arrived, end["lost_percent"]

    best, loss = run(math.inf)
    if loss <= _UDP_LOSS:
        return best
    # A flood does not arrive better than the best rate: what passes lies below half as much more.
    low, high, best = 0.0, best * 1.5, 0.0
    for _ in range(_UDP_STEPS):
        rate = (low + high) / 2
        arrived, loss = run(rate)
        if loss <= _UDP_LOSS:
            low, best = rate, max(best, arrived)
        else:
            high = rate
    return best


def _iperf(
    network: Network, target: str, seconds: int, *flags: str
) -> Mapping[str, Mapping[str, float]]:
    words = ["iperf3", "-c", target, "-p", str(IPERF_PORT), "-t", str(seconds), "-J", *flags]
    error = ""
    for _ in range(_ATTEMPTS):
        try:
            result = network.client.run(*words, deadline=seconds + 15, check=False)
        except subprocess.TimeoutExpired:
            raise MeasurementError(f"{' '.join(words)} does not end") from None
        try:
            answer = json.loads(result.stdout)
        except json.JSONDecodeError:
            answer = {"error": result.stderr or result.stdout}
        error = answer.get("error", "")
        if not error:
            end: Mapping[str, Mapping[str, float]] = answer["end"]
            return end
        if not any(words in error for words in _NOT_YET):
            break
        time.sleep(0.25)
    raise MeasurementError(f"{' '.join(words)}: {error.strip()}")


def _ping(network: Network, target: str) -> Mapping[str, float]:
    result = network.client.run(
        *("ping", "-n", "-c", str(_PINGS), "-i", str(_PING_INTERVAL), "-W1", target),
        check=False,
    )
    times = [float(found) * 1e3 for found in re.findall(r"time=([0-9.]+) ms", result.stdout)]
    if len(times) < _PINGS / 2:
        raise MeasurementError(f"ping {target}: {len(times)} of {_PINGS} came back")
    hundredths = statistics.quantiles(times, n=100)
    return {"ping_p50_us": hundredths[49], "ping_p99_us": hundredths[98]}


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process with all its threads, proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS


def _resident(pid: int) -> float:
    """Bytes of resident memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) * 1024.0 if found else math.nan
