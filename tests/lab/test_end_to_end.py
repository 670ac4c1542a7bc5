"""What a user sends is read by nobody on the way: neither on the wire nor in the relay's memory."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.conftest import ECHO, WEB, Site, reason_to_skip
from tests.lab.test_tunnel import echo, udp_socket

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
]


def memory_of(pid: int) -> Iterator[bytes]:
    """All that a process could put into a core dump: its readable mappings, one by one."""
    with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb", 0) as mem:
        for line in maps:
            found = re.match(r"([0-9a-f]+)-([0-9a-f]+) r", line)
            if found is None or "[v" in line:  # vvar and vsyscall are the kernel's
                continue
            start, end = (int(each, 16) for each in found.groups())
            mem.seek(start)
            try:
                yield mem.read(end - start)
            except OSError:
                continue  # a mapping of a device, or one that has just gone


def holds(pid: int, marker: bytes) -> bool:
    return any(marker in part for part in memory_of(pid))


def _start_by_the_relay(site: Site) -> None:
    """An agent that looks for no direct path, so that all it sends passes the relay."""
    file = site.agent_file("visitor")
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "direct": {"enabled": False}}))
    site.start_agent(site.guest, file)


def test_the_relay_cannot_read(site: Site, tmp_path: Path) -> None:
    marker = os.urandom(12).hex().encode()
    _start_by_the_relay(site)
    pids = {p.name: p.pid for p in site.deployment.processes}
    wire = tmp_path / "relay.pcap"
    with site.relay.capture(wire), udp_socket(site.guest, (ECHO, 9999)) as udp:
        for number in range(50):
            echo(udp, b"%s %d" % (marker, number))
        answer = site.guest.run("curl", "-sS", f"http://{WEB}/get?q={marker.decode()}")
    assert marker.decode() in answer.stdout
    # The same search finds it where it may be, so that it proves something where it does not.
    assert holds(pids["connector-office"], marker)
    assert not holds(pids["intermediate-relay"], marker)
    captured = wire.read_bytes()
    assert captured.count(b"\x80") > 50, "the packets went by the relay"
    assert marker not in captured
