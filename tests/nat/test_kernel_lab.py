"""The kernel laboratory: what it builds, what its verbs do, and that nothing stays behind."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import dpkt
import pytest

from ztna.errors import SystemSetupError
from ztna.nat import netns
from ztna.nat.kernel_lab import Gateway, Host, KernelLab, supported
from ztna.nat.kernel_settle import flush_backlogs
from ztna.nat.netns import Namespace

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(supported() is not None, reason=supported() or ""),
]


@attrs.frozen
class Network:
    lab: KernelLab
    server: Host
    stranger: Host
    gateway: Gateway
    laptop: Host
    desktop: Host


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with KernelLab() as lab:
        gateway = lab.gateway("home", "198.51.100.20", "10.1.0.0/24")
        yield Network(
            lab,
            lab.public_host("server", "198.51.100.10"),
            lab.public_host("stranger", "198.51.100.11"),
            gateway,
            lab.host("laptop", "10.1.0.2", behind=gateway),
            lab.host("desktop", "10.1.0.3", behind=gateway),
        )


def bound(host: Host, port: int) -> socket.socket:
    udp = host.namespace.open_socket()
    udp.bind((host.address, port))
    udp.settimeout(2)
    return udp


def silent(network: Network, udp: socket.socket) -> bool:
    """Whether nothing has come of what was sent by now."""
    flush_backlogs(network.server.namespace)
    udp.settimeout(0)
    try:
        udp.recv(100)
    except BlockingIOError:
        return True
    finally:
        udp.settimeout(2)
    return False


def test_namespaces_are_gone_with_the_lab() -> None:
    with KernelLab() as lab:
        host = lab.public_host("solo", "198.51.100.10")
        process = host.popen("sleep", "100")
        path = host.namespace.path
        assert path.exists()
        assert host.namespace.process_ids() == [process.pid]
    assert not path.exists()
    assert process.returncode == -9


def test_failed_build_leaves_nothing() -> None:
    def build() -> None:
        with KernelLab() as lab:
            paths.append(lab.public_host("twin", "198.51.100.10").namespace.path)
            lab.public_host("twin", "198.51.100.11")

    paths: list[Path] = []
    with pytest.raises(ValueError, match="only once"):
        build()
    (path,) = paths
    assert not path.exists()


def test_leftovers_of_a_dead_run_are_removed() -> None:
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, check=True)
    stale = Namespace.create(f"ztlab{int(dead.stdout):x}-stale")
    sleeper = stale.popen("sleep", "100")
    alive = Namespace.create(netns.new_name("alive"))
    try:
        assert netns.cleanup_stale() == [stale.name]
        assert sleeper.wait(2) == -9
        assert not stale.path.exists()
        assert alive.path.exists()
    finally:
        alive.close()


def test_program_output_exit_code_and_deadline(network: Network) -> None:
    assert network.laptop.run("cat", text="in and out").stdout == "in and out"
    assert network.laptop.run("false", check=False).returncode == 1
    with pytest.raises(subprocess.CalledProcessError):
        network.laptop.run("false")
    start = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        network.laptop.run("sleep", "100", deadline=0.05)
    assert time.monotonic() - start < 10
    assert network.laptop.namespace.process_ids() == []


def test_calling_thread_comes_back(network: Network) -> None:
    def fail_inside() -> None:
        with network.laptop.namespace.entered():
            assert os.readlink("/proc/thread-self/ns/net") != before
            raise RuntimeError

    before = os.readlink("/proc/thread-self/ns/net")
    with pytest.raises(RuntimeError):
        fail_inside()
    assert os.readlink("/proc/thread-self/ns/net") == before


def test_lan_hosts_reach_the_public_and_each_other(network: Network) -> None:
    for address in ("198.51.100.10", network.desktop.address):
        network.laptop.run("ping", "-c1", "-W1", address)
    # Nothing has a route to a private address from outside.
    assert network.server.run("ping", "-c1", "-W1", "10.1.0.2", check=False).returncode != 0


def test_mapping_is_endpoint_independent_and_filtering_port_restricted(network: Network) -> None:
    with (
        bound(network.laptop, 5000) as inside,
        bound(network.server, 7000) as server,
        bound(network.server, 7001) as other_port,
        bound(network.stranger, 7000) as stranger,
    ):
        inside.sendto(b"out", (network.server.address, 7000))
        _, mapped = server.recvfrom(100)
        assert mapped == (network.gateway.outside.address, 5000)  # port preserved
        for udp in (other_port, stranger):
            udp.sendto(b"uninvited", mapped)
        assert silent(network, inside)
        server.sendto(b"answer", mapped)
        assert inside.recv(100) == b"answer"
        inside.sendto(b"out", (network.stranger.address, 7000))
        assert stranger.recvfrom(100)[1] == mapped


def test_two_lan_hosts_with_one_port_get_two_mappings_that_stay(network: Network) -> None:
    with (
        bound(network.laptop, 5001) as first,
        bound(network.desktop, 5001) as second,
        bound(network.server, 7000) as server,
        bound(network.stranger, 7000) as stranger,
    ):
        # Towards different peers, plain masquerade would let both share one external port.
        first.sendto(b"out", (network.server.address, 7000))
        _, first_mapped = server.recvfrom(100)
        second.sendto(b"out", (network.stranger.address, 7000))
        _, second_mapped = stranger.recvfrom(100)
        assert first_mapped != second_mapped
        second.sendto(b"out", (network.server.address, 7000))
        assert server.recvfrom(100)[1] == second_mapped
        server.sendto(b"to second", second_mapped)
        assert second.recv(100) == b"to second"


def test_nobody_is_routed_past_the_nat(network: Network) -> None:
    router = network.lab.public.namespace
    router.ip(f"route add {network.laptop.address}/32 via {network.gateway.outside.address}")
    try:
        with bound(network.laptop, 5003) as inside, bound(network.server, 7000) as server:
            server.sendto(b"past the NAT", (network.laptop.address, 5003))
            assert silent(network, inside)
    finally:
        router.ip(f"route del {network.laptop.address}/32")


def test_own_rules_replace_the_nat() -> None:
    with KernelLab() as lab:
        server = lab.public_host("server", "198.51.100.10")
        gateway = lab.gateway("office", "198.51.100.20", "10.2.0.0/24")
        inside = lab.host("desk", "10.2.0.2", behind=gateway)
        with bound(inside, 5000) as udp, bound(server, 7000) as outside:
            gateway.load(lambda wan: f'add table ip natlab {{ comment "no NAT on {wan}"; }}')
            udp.sendto(b"as it is", (server.address, 7000))
            assert outside.recvfrom(100)[1] == (inside.address, 5000)


def test_gateway_behind_a_gateway(network: Network) -> None:
    with KernelLab() as lab:
        server = lab.public_host("server", "198.51.100.10")
        carrier = lab.gateway("carrier", "198.51.100.20", "100.64.0.0/24")
        home = lab.gateway("home", "100.64.0.2", "10.3.0.0/24", behind=carrier)
        phone = lab.host("phone", "10.3.0.2", behind=home)
        with bound(phone, 5000) as udp, bound(server, 7000) as outside:
            udp.sendto(b"out", (server.address, 7000))
            _, mapped = outside.recvfrom(100)
            assert mapped[0] == "198.51.100.20"
            outside.sendto(b"back", mapped)
            assert udp.recv(100) == b"back"


def test_address_outside_the_lan_is_an_error(network: Network) -> None:
    with pytest.raises(ValueError, match=r"not in the gateway's LAN, 10\.1\.0\.0/24"):
        network.lab.host("lost", "10.9.0.2", behind=network.gateway)


def test_block_and_unblock(network: Network) -> None:
    def ping() -> int:
        return network.laptop.run("ping", "-c1", "-W0.2", "198.51.100.11", check=False).returncode

    network.laptop.block("198.51.100.11")
    assert ping() != 0
    network.desktop.run("ping", "-c1", "-W1", "198.51.100.11")
    network.laptop.unblock("198.51.100.11")
    assert ping() == 0


def test_cable_pulled_and_plugged(network: Network) -> None:
    network.laptop.pull_cable()
    assert "NO-CARRIER" in network.laptop.run("ip", "link", "show", "eth0").stdout
    network.laptop.plug_cable()
    network.laptop.run("ping", "-c1", "-W1", "198.51.100.10")


def test_capture_holds_what_crossed(network: Network, tmp_path: Path) -> None:
    file = tmp_path / "laptop.pcap"
    with (
        bound(network.laptop, 5002) as udp,
        bound(network.server, 7002),
        network.laptop.capture(file),
    ):
        for _ in range(500):
            udp.sendto(b"seen on the wire", (network.server.address, 7002))
    with file.open("rb") as opened:
        frames = [bytes(frame) for _, frame in dpkt.pcap.Reader(opened)]
    seen = [frame for frame in frames if b"seen on the wire" in frame]
    assert len(seen) == 500
    assert dpkt.ethernet.Ethernet(seen[0]).data.data.dport == 7002


def test_errors_say_what_failed(network: Network) -> None:
    namespace = network.server.namespace
    with pytest.raises(SystemSetupError, match="nowhere"):
        namespace.ip("link set nowhere up")
    with pytest.raises(SystemSetupError, match="cannot set sysctl net/nothing"):
        namespace.set_sysctl("net/nothing", "1")
    with pytest.raises(SystemSetupError, match="syntax error"):
        namespace.nft("nonsense")
    with pytest.raises(SystemSetupError, match="cannot enter network namespace"):
        Namespace("ztlab-none").run("true")


def test_command_runs_inside_from_elsewhere(network: Network) -> None:
    words = network.laptop.namespace.command("cat", "/proc/net/route")
    assert "eth0" in subprocess.run(words, capture_output=True, check=True, text=True).stdout
