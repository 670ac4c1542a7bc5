"""Garbage at full speed on every port of a deployment, while a ping and a download run.

For each kind of flood: what the users' traffic did, what every role's memory did, and how much went
out for what came in. The floods and the roles share this machine's CPU, so throughput falls by
their share; `nothing` is the measure to compare with.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import attrs

from scripts.lab.deployment import PYTHON, ROOT
from scripts.lab.recovery_site import ECHO, FILES, RELAY, RecoverySite, build
from ztna.nat.kernel_lab import Host, KernelLab

FLOOD = ROOT / "scripts/lab/flood.py"
FORGED = "198.18.0.0/15"  # RFC 2544: nobody's; answers go nowhere
FILE_BYTES = 16 << 20
# Echoes behind those that are counted, 2 s of them: for the answer to its last one, ping waits no
# longer than an interval, whatever is given as -W (iputils, `ping_common.c`).
AFTER = 20


@attrs.frozen
class Flood:
    """Who sends, where to. spoof: the network of forged sources, or None."""

    name: str
    sender: Host
    host: str
    port: int
    spoof: str | None = None


@attrs.frozen
class Report:
    """What one flood did. Times in seconds, memory in bytes, rate in bytes a second.

    ratio: bytes that the sender got for each that it sent; None for forged sources.
    registrations: how often clients registered meanwhile: 0, or a session was lost.
    """

    flood: str
    sent: int
    sent_bytes: int
    ratio: float | None
    downloads: int
    broken: int
    rate: float
    ping_sent: int
    ping_lost: int
    ping_p50: float
    ping_p99: float
    growth: dict[str, int]
    registrations: int


def floods_on(site: RecoverySite, lab: KernelLab) -> list[Flood]:
    """One flood for each port, and those from many sources."""
    attacker = lab.public_host("attacker", "198.51.100.66")
    agent_port = _udp_port(site.agent)
    return [
        Flood("intermediate, one source", attacker, RELAY, 4433),
        Flood("intermediate, 131,070 sources", attacker, RELAY, 4433, FORGED),
        Flood("connector, from its LAN", site.apps, site.connector.address, 4434),
        Flood("agent, from its LAN", site.second, site.agent.address, agent_port),
    ]


def measure(site: RecoverySite, flood: Flood | None, seconds: float) -> Report:
    """Run one flood (or none) for so long under a ping and downloads one after another."""
    before = {role: _resident(process.pid) for role, process in site.roles.items()}
    registered = _registrations(site)
    received, transmitted = _bytes(flood.sender) if flood else (0, 0)
    count = int(seconds / 0.1)
    echoes = str(count + AFTER)
    ping = site.agent.popen(
        *("ping", "-n", "-i", "0.1", "-c", echoes, ECHO), stdout=subprocess.PIPE
    )
    sender = None
    if flood is not None:
        spoof = [] if flood.spoof is None else ["--spoof", flood.spoof]
        where = (flood.host, str(flood.port), str(seconds))
        sender = flood.sender.popen(PYTHON, FLOOD, *where, *spoof, stdout=subprocess.PIPE)
    downloads = broken = 0
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        good = _download(site)
        downloads, broken = downloads + good, broken + (not good)
    took = time.monotonic() - start
    said = json.loads(sender.communicate(timeout=60)[0]) if sender else {"datagrams": 0, "bytes": 0}
    answers = re.findall(r"icmp_seq=(\d+) .*time=([\d.]+)", ping.communicate(timeout=60)[0])
    times = [*{int(n): float(each) for n, each in answers if int(n) <= count}.values()]
    ratio = None
    if flood is not None and flood.spoof is None:
        now = _bytes(flood.sender)
        ratio = (now[0] - received) / max(1, now[1] - transmitted)
    time.sleep(1)
    return Report(
        flood.name if flood else "nothing",
        said["datagrams"],
        said["bytes"],
        ratio,
        downloads,
        broken,
        downloads * len(site.content) / took,
        count,
        count - len(times),
        _quantile(times, 0.5) / 1000,
        _quantile(times, 0.99) / 1000,
        {role: _resident(process.pid) - before[role] for role, process in site.roles.items()},
        _registrations(site) - registered,
    )


def _download(site: RecoverySite) -> bool:
    with tempfile.NamedTemporaryFile() as file:
        words = ("curl", "-sS", "--max-time", "120", "-o", file.name, f"http://{FILES}/download")
        site.agent.run(*words, check=False, deadline=130)
        return Path(file.name).read_bytes() == site.content


def _udp_port(host: Host) -> int:
    """The port of the role on a host: its only UDP socket."""
    lines = host.run("ss", "-Hlun").stdout.splitlines()
    return int(lines[0].split()[3].rpartition(":")[2])


def _bytes(host: Host) -> tuple[int, int]:
    """What its interface has received and sent."""
    fields = host.run("cat", "/proc/net/dev").stdout.split(f"{host.interface}:")[1].split()
    return int(fields[0]), int(fields[8])


def _resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) << 10


def _registrations(site: RecoverySite) -> int:
    return sum(process.output().count("] registered") for process in site.roles.values())


def _quantile(times: Sequence[float], share: float) -> float:
    return sorted(times)[int(share * (len(times) - 1))] if times else float("inf")


def show(report: Report) -> str:
    """Two lines a person can read."""
    memory = ", ".join(f"{role} {size / 2**20:+.1f}" for role, size in report.growth.items())
    ratio = "-" if report.ratio is None else f"{report.ratio:.2f}"
    return (
        f"{report.flood}: {report.sent:,} datagrams, {report.sent_bytes / 1e6:,.0f} MB; "
        f"bytes out for each in {ratio}; sessions lost {report.registrations}\n"
        f"    download {report.rate / 1e6:.1f} MB/s ({report.downloads} whole, {report.broken} "
        f"broken); ping lost {report.ping_lost} of {report.ping_sent}, p50 "
        f"{report.ping_p50 * 1e3:.1f} ms, p99 {report.ping_p99 * 1e3:.1f} ms; MiB {memory}"
    )


def main() -> int:
    """The command line."""
    options = argparse.ArgumentParser(prog="scripts/abuse", description=__doc__)
    options.add_argument("--seconds", type=float, default=60, help="each flood (60)")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder, KernelLab() as lab:
        site = build(lab, Path(folder), FILE_BYTES)
        reports = []
        for flood in (None, *floods_on(site, lab)):
            reports.append(measure(site, flood, given.seconds))
            print(show(reports[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps([attrs.asdict(each) for each in reports], indent=1))
    return int(any(report.broken or report.registrations for report in reports))


if __name__ == "__main__":
    sys.exit(main())
