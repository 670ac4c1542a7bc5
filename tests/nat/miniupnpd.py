"""Debian's miniupnpd on a gateway of the kernel laboratory: it maps ports, or opens pinholes in a
firewall of IPv6."""

import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ztna.core.upnp.messages import SSDP
from ztna.nat.netns import Namespace

PROGRAM = shutil.which("miniupnpd") or shutil.which("miniupnpd", path="/usr/sbin:/sbin")
MISSING = "miniupnpd is missing (scripts/setup miniupnpd)"
# It refuses to serve on the documentation's networks, so this one is anybody's.
OUTER = "11.0.0.20"

# The chains that its nftables back end fills, as its nft_init.sh makes them.
_CHAINS = """
table inet filter {
 chain forward { type filter hook forward priority 0; jump miniupnpd; }
 chain miniupnpd { }
 chain prerouting { type nat hook prerouting priority -100; jump prerouting_miniupnpd; }
 chain prerouting_miniupnpd { }
 chain postrouting { type nat hook postrouting priority 90; jump postrouting_miniupnpd; }
 chain postrouting_miniupnpd { }
}
"""

# A firewall of IPv6 that lets in what it opens; all of it has to be one chain, as what another one
# drops is dropped.
_FIREWALL = """
table inet filter {
 chain forward {
  type filter hook forward priority 0; policy drop;
  ct state established,related accept
  iifname != "wan" accept
  jump miniupnpd
 }
 chain miniupnpd { }
 chain prerouting { type nat hook prerouting priority -100; jump prerouting_miniupnpd; }
 chain prerouting_miniupnpd { }
 chain postrouting { type nat hook postrouting priority 90; jump postrouting_miniupnpd; }
 chain postrouting_miniupnpd { }
}
"""

_BY_PCP = "Listening for NAT-PMP/PCP"
_YES = {False: "no", True: "yes"}


@contextmanager
def miniupnpd(
    namespace: Namespace, router: str, folder: Path, *, upnp: bool = False
) -> Iterator[None]:
    """The server, from when it listens until it is killed; it begins with nothing mapped.

    router: the gateway's address in its LAN, a /24. folder: for its files. upnp: it speaks UPnP
    alone, to the first host of that LAN; else PCP and NAT-PMP alone.
    """
    namespace.nft(f"add table inet filter\ndelete table inet filter\n{_CHAINS}")
    file, lease = folder / "miniupnpd.conf", folder / "leases"
    lease.unlink(missing_ok=True)
    file.write_text(
        f"ext_ifname=wan\nlistening_ip={router}/24\nipv6_disable=yes\n"
        f"enable_natpmp={_YES[not upnp]}\nenable_upnp={_YES[upnp]}\n"
        f"secure_mode=yes\nsystem_uptime=no\nlease_file={lease}\n"
        "uuid=cc2d41e6-98d8-4ef8-b38b-b8bff0c4a70a\n"
        f"allow 1024-65535 {router}/24 1024-65535\ndeny 0-65535 0.0.0.0/0 0-65535\n"
    )
    words = (str(PROGRAM), "-d", "-f", file, "-P", folder / "miniupnpd.pid")
    server = _started(namespace, words, "HTTP listening on port" if upnp else _BY_PCP)
    # All links of a gateway have this address, so it listens for searches on any one of them; with
    # a member on the first link the kernel gives it those too.
    with namespace.open_socket() as member:
        with namespace.entered():
            link = socket.if_nametoindex("link1")
        group = struct.pack("=4s4xi", socket.inet_aton(SSDP[0]), link)  # struct ip_mreqn
        member.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
        try:
            yield
        finally:
            server.kill()
            server.wait()


@contextmanager
def pinholes(namespace: Namespace, link: str, folder: Path) -> Iterator[None]:
    """A firewall of IPv6 and the server, which opens it by PCP. link: the interface to the LAN;
    the other one, `wan`, needs an IPv4 address that anybody has, or it does not serve."""
    namespace.nft(_FIREWALL)
    file = folder / "miniupnpd6.conf"
    file.write_text(
        f"ext_ifname=wan\nlistening_ip={link}\nenable_natpmp=yes\nenable_upnp=no\n"
        f"secure_mode=yes\nlease_file={folder / 'leases6'}\n"
        "uuid=cc2d41e6-98d8-4ef8-b38b-b8bff0c4a70a\n"
        "allow 1024-65535 10.1.0.1/24 1024-65535\ndeny 0-65535 0.0.0.0/0 0-65535\n"
    )
    words = (str(PROGRAM), "-d", "-f", file, "-P", folder / "miniupnpd6.pid")
    server = _started(namespace, words, _BY_PCP)
    try:
        yield
    finally:
        server.kill()
        server.communicate()


def open_pinholes(namespace: Namespace) -> str:
    """What it lets in."""
    return namespace.run("nft", "list", "chain", "inet", "filter", "miniupnpd").stdout


def _started(
    namespace: Namespace, words: Sequence[str | Path], ready: str
) -> subprocess.Popen[str]:
    server = namespace.popen(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert server.stdout is not None
    heard = ""
    while ready not in heard:
        line = server.stdout.readline()
        assert line, heard
        heard += line
    return server


def installed_rules(namespace: Namespace) -> str:
    """What it has installed."""
    words = ("nft", "list", "chain", "inet", "filter", "prerouting_miniupnpd")
    return namespace.run(*words).stdout
