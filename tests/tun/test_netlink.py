"""Addresses and routes: put there, in conflict, taken back, and mended after a kill -9."""

import functools
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from ipaddress import IPv4Network, IPv6Address, ip_interface, ip_network
from pathlib import Path
from typing import Any

import attrs
import pytest
import structlog.testing
import trio

from tests.tun.namespace import drop_privileges, end_by_itself, in_namespace, run_in_child
from ztna.errors import ConfigError, SystemSetupError
from ztna.tun import journal, link
from ztna.tun.device import open_tun
from ztna.tun.netlink import check_outside, find_conflict, repair, tun_network
from ztna.tun.networks import Interface, Network, Occupied
from ztna.tun.own_routes import watched_own_routes

ADDRESSES: list[Interface] = [ip_interface("10.100.64.5/18"), ip_interface("fd7a::5/128")]
ROUTES: list[Network] = [ip_network("10.100.0.0/24"), ip_network("fd7a::/96")]
MTU = 1280


def run(*commands: str) -> str:
    """Run commands, which must succeed; return what they print."""
    done = [subprocess.run(c.split(), check=True, capture_output=True, text=True) for c in commands]
    return "".join(item.stdout for item in done)


def snapshot() -> list[str]:
    """What `ip` shows of the namespace. A queueing discipline once attached stays; it is not
    ours to take away."""
    text = run(
        "ip -d addr", "ip -4 route show table all", "ip -6 route show table all", "ip rule",
        "ip -6 rule",
    )  # fmt: skip
    lines = [line.partition("qdisc")[0] + line.partition("state")[2] for line in text.splitlines()]
    return lines + run("sysctl net.ipv6.conf").splitlines()


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.parametrize(
    ("network", "conflicts"),
    [
        ("10.100.0.0/24", True),
        ("10.100.0.0/25", True),
        ("10.100.0.77/32", True),
        ("10.100.0.0/16", False),  # wider: ours wins
        ("10.0.0.0/8", False),
        ("10.100.1.0/24", False),
        ("fd7a::1/128", True),
        ("::/0", False),
    ],
)
def test_conflicts(network: str, conflicts: bool) -> None:
    taken = Occupied(ip_network(network), "the route", "to eth0")
    words = find_conflict(ROUTES, [Occupied(ip_network("192.0.2.0/24"), "the route", ""), taken])
    assert (words is not None) == conflicts
    if words:
        assert f"the route {network} is there already, to eth0" in words


@pytest.mark.parametrize("address", ["10.100.0.255", "::ffff:10.100.0.1", "fd7a::1"])
def test_intermediate_inside_the_tunnel(address: str) -> None:
    with pytest.raises(ConfigError, match=rf"{address} lies in .*service_range"):
        check_outside(address, ROUTES)


@pytest.mark.parametrize("address", ["10.100.1.0", "192.0.2.1", "::ffff:192.0.2.1", "2001:db8::1"])
def test_intermediate_outside_the_tunnel(address: str) -> None:
    check_outside(address, ROUTES)


@in_namespace
async def test_set_and_taken_back_exactly() -> None:
    run("ip link add veth0 type veth peer name veth1", "ip addr add 192.0.2.1/24 dev veth0",
        "ip link set veth0 up", "ip link set veth1 up", "ip addr add 10.1.0.1/8 dev veth1",
        "ip route add default via 192.0.2.2", "ip route add blackhole 198.51.100.0/24")  # fmt: skip
    outside = run("ip route", "ip rule", "ip -4 addr")
    with folder() as state_dir:
        async with open_tun("utun", MTU) as tun:
            before = snapshot()
            async with tun_network(tun.name, MTU, ADDRESSES, ROUTES, state_dir=state_dir) as done:
                assert done.addresses == tuple(ADDRESSES)
                assert done.routes == (ip_network("10.100.64.0/18"), *ROUTES)
                assert len(os.listdir(state_dir)) == 1
                assert "utun0 proto static" in run("ip route get 10.100.0.9", "ip route")
                assert "dev utun0" in run("ip route get 10.100.0.9")
                assert "src 10.100.64.5" in run("ip route get 10.100.0.9")
                assert "src fd7a::5" in run("ip route get fd7a::1")
                assert "dev veth1" in run("ip route get 10.200.0.1")
                own = run("ip addr show dev utun0")
                assert "fe80" not in own
                assert "tentative" not in own
                assert "nodad" in own
                assert (
                    run("sysctl -n net.ipv6.conf.utun0.accept_ra net.ipv6.conf.utun0.autoconf")
                    == "0\n0\n"
                )
            assert snapshot() == before
            assert os.listdir(state_dir) == []
        assert run("ip route", "ip rule", "ip -4 addr") == outside


@in_namespace
def test_addresses_receive_from_the_first_moment() -> None:
    """Many times: without waiting for the kernel, one in seven came too early on a busy machine."""
    make = link.bring_up

    def checked(socket: Any, record: journal.Record, mtu: int) -> None:
        make(socket, record, mtu)
        # Without another program or thread, which would take time.
        assert "fd7a0000000000000000000000000005 80" in own_routes()

    link.bring_up = checked  # in this child alone

    async def many() -> None:
        with folder() as state_dir:
            for _ in range(60):
                async with (
                    open_tun("utun", MTU) as tun,
                    tun_network(tun.name, MTU, ADDRESSES, ROUTES, state_dir=state_dir),
                ):
                    pass

    trio.run(many)


def own_routes() -> list[str]:
    """Those of the kernel's local IPv6 table: address and length in hex (RTF_LOCAL)."""
    lines = [line.split() for line in Path("/proc/net/ipv6_route").read_text().splitlines()]
    return [f"{words[0]} {words[1]}" for words in lines if int(words[8], 16) & 0x8000_0000]


@in_namespace
async def test_own_route_that_comes_late() -> None:
    own, route = IPv6Address("fd7a::5"), "local fd7a::5 dev utun0 table local"
    with folder() as state_dir:
        async with (
            open_tun("utun", MTU) as tun,
            tun_network(tun.name, MTU, ADDRESSES, ROUTES, state_dir=state_dir),
        ):
            for patience in (30.0, 0.01):
                run(f"ip -6 route del {route}")
                with (
                    structlog.testing.capture_logs() as logs,
                    link.open_socket() as socket,
                    watched_own_routes(socket, patience) as wait,
                ):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(trio.to_thread.run_sync, wait, [own])
                        if patience > 1:
                            run(f"ip -6 route add {route}")
                assert [entry["event"] for entry in logs] == (
                    [] if patience > 1 else ["IPv6 address receives nothing yet"]
                )


@in_namespace
async def test_taken_back_when_cancelled() -> None:
    with folder() as state_dir:
        async with open_tun("utun", MTU) as tun:
            before = snapshot()
            with trio.CancelScope() as scope:
                async with tun_network(tun.name, MTU, ADDRESSES, ROUTES, state_dir=state_dir):
                    scope.cancel()
                    await trio.sleep_forever()
            assert snapshot() == before


@in_namespace
async def test_conflict_names_route_and_interface() -> None:
    run("ip link add veth0 type veth peer name veth1", "ip link set veth0 up")
    cases = [
        ("ip route add 10.100.0.128/25 dev veth0", "ip route del 10.100.0.128/25",
         r"10\.100\.0\.0/24 .*the route 10\.100\.0\.128/25 .*to veth0"),
        ("ip addr add 10.100.64.5/32 dev veth1", "ip addr del 10.100.64.5/32 dev veth1",
         r"the address 10\.100\.64\.5/32 is there already, on veth1"),
        ("ip route add unreachable 10.100.0.0/24", "ip route del unreachable 10.100.0.0/24",
         "the route 10.100.0.0/24 is there already, without an interface"),
        ("ip route add 10.100.0.0/24 nexthop dev veth0 nexthop dev veth0",
         "ip route del 10.100.0.0/24", "the route 10.100.0.0/24 is there already, to veth0"),
    ]  # fmt: skip
    with folder() as state_dir:
        async with open_tun("utun", MTU) as tun:
            for make, remove, words in cases:
                run(make)
                before = snapshot()
                with pytest.raises(SystemSetupError, match=words):
                    async with tun_network(tun.name, MTU, ADDRESSES, ROUTES, state_dir=state_dir):
                        pass
                assert snapshot() == before
                assert os.listdir(state_dir) == []
                run(remove)


@in_namespace
async def test_own_address_is_somebody_elses() -> None:
    run("ip link add veth0 type veth peer name veth1", "ip addr add 10.100.64.5/24 dev veth0")
    own: list[Interface] = [ip_interface("10.100.64.5/32")]
    with folder() as state_dir:
        async with open_tun("utun", MTU) as tun:
            with pytest.raises(SystemSetupError, match=r"address 10\.100\.64\.5/32 .* on veth0"):
                async with tun_network(tun.name, MTU, own, [], state_dir=state_dir):
                    pass
            run("ip addr del 10.100.64.5/24 dev veth0")
            async with tun_network(tun.name, MTU, own, [], state_dir=state_dir) as done:
                assert (done.addresses, done.routes) == (tuple(own), ())


@in_namespace
async def test_refusals_leave_nothing_behind() -> None:
    with folder() as state_dir:
        with pytest.raises(SystemSetupError, match="there is no interface utun0"):
            async with tun_network("utun0", MTU, ADDRESSES, ROUTES, state_dir=state_dir):
                pass
        async with open_tun("utun", MTU) as tun:
            before = snapshot()
            with pytest.raises(SystemSetupError, match="cannot have an MTU of 66000"):
                async with tun_network(tun.name, 66_000, ADDRESSES, ROUTES, state_dir=state_dir):
                    pass
            wrong: list[Interface] = [*ADDRESSES, ip_interface("127.0.0.1/32"),
                                      ip_interface("ff02::5/128")]  # fmt: skip
            with pytest.raises(SystemSetupError, match="the kernel refused the network of utun0"):
                async with tun_network(tun.name, MTU, wrong, ROUTES, state_dir=state_dir):
                    pass
            assert snapshot() == before
            assert os.listdir(state_dir) == []
            with pytest.raises(SystemSetupError, match=r"state folder .* cannot be written"):
                async with tun_network(
                    tun.name, MTU, ADDRESSES, ROUTES, state_dir=Path("/proc/nowhere")
                ):
                    pass


@in_namespace
def test_without_privilege() -> None:
    run("ip tuntap add dev kept mode tun")
    before = snapshot()

    async def attempt(state_dir: Path) -> None:
        with pytest.raises(SystemSetupError, match=r"no permission .* of kept: run as root"):
            async with tun_network("kept", MTU, ADDRESSES, ROUTES, state_dir=state_dir):
                pass

    def unprivileged() -> None:
        drop_privileges()
        trio.run(attempt, state_dir)

    with folder() as state_dir:
        state_dir.chmod(0o777)
        assert run_in_child(unprivileged) == ""
        assert snapshot() == before
        assert trio.run(repair, state_dir) == 1  # it could not tell whether something was done
        assert snapshot() == before


@in_namespace
async def test_goes_on_without_ipv6() -> None:
    for setting, mtu in (("1", MTU), ("0", 1000)):
        run(f"sysctl -w net.ipv6.conf.default.disable_ipv6={setting}")
        with folder() as state_dir:
            async with open_tun("utun", mtu) as tun:
                before = snapshot()
                async with tun_network(
                    tun.name, mtu, ADDRESSES, ROUTES, state_dir=state_dir
                ) as done:
                    assert done.addresses == (ip_interface("10.100.64.5/18"),)
                    assert {item.version for item in done.routes} == {4}
                    assert "inet6" not in run("ip addr show dev utun0")
                assert snapshot() == before


@in_namespace
async def test_operators_interface_keeps_what_it_had() -> None:
    run("ip tuntap add dev kept mode tun vnet_hdr", "ip link set kept mtu 1400 txqueuelen 77 up",
        "ip addr add 10.100.64.5/18 dev kept", "ip addr add 172.16.0.1/24 dev kept",
        "ip route add 10.100.0.0/24 dev kept")  # fmt: skip
    with folder() as state_dir:
        async with open_tun("kept", MTU) as tun:
            # Attaching gives it a carrier, which its addresses and routes show a moment later.
            with trio.fail_after(5):
                while "LOWER_UP" not in run("ip link show kept"):
                    await trio.lowlevel.checkpoint()
            before = snapshot()
            async with tun_network(tun.name, MTU, ADDRESSES, ROUTES, state_dir=state_dir) as done:
                assert done.routes == (ip_network("10.100.64.0/18"), *ROUTES)
                assert "mtu 1280" in run("ip link show kept")
            assert snapshot() == before


def _start_and_report(name: str, state_dir: Path) -> tuple[int, str]:
    """Fork a process that holds the tunnel's network until it is killed; return its pid and the
    interface's name."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        end_by_itself()

        async def hold() -> None:
            async with (
                open_tun(name, MTU) as tun,
                tun_network(tun.name, MTU, ADDRESSES, ROUTES, state_dir=state_dir),
            ):
                os.write(writer, tun.name.encode())
                await trio.sleep_forever()

        try:
            trio.run(hold)
        finally:
            os._exit(1)
    os.close(writer)
    actual = os.read(reader, 15).decode()
    os.close(reader)
    return child, actual


@in_namespace
def test_killed_and_started_again() -> None:
    run("ip tuntap add dev kept mode tun vnet_hdr", "ip link set kept mtu 1400")
    before = snapshot()
    for name, mended in (("kept", 1), ("utun", 1)):
        with folder() as state_dir:
            child, actual = _start_and_report(name, state_dir)
            during = snapshot()
            assert f"dev {actual} proto static" in run("ip route")
            assert trio.run(repair, state_dir) == 0  # its writer lives
            assert snapshot() == during
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            assert (snapshot() == before) == (name == "utun")  # that one vanished by itself
            assert len(os.listdir(state_dir)) == 1
            assert trio.run(repair, state_dir) == mended
            assert snapshot() == before
            assert os.listdir(state_dir) == []


@in_namespace
def test_next_start_repairs_by_itself() -> None:
    run("ip tuntap add dev kept mode tun vnet_hdr")
    before = snapshot()
    with folder() as state_dir:
        child, _ = _start_and_report("kept", state_dir)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

        async def again() -> None:
            async with (
                open_tun("kept", MTU) as tun,
                tun_network(tun.name, MTU, ADDRESSES, ROUTES, state_dir=state_dir),
            ):
                assert len(os.listdir(state_dir)) == 1

        trio.run(again)
        assert snapshot() == before
        assert os.listdir(state_dir) == []


@in_namespace
async def test_an_address_laid_over_the_routes_and_another_one() -> None:
    """As an agent does it: the routes are never away, though the first address goes."""
    addresses: list[list[Interface]] = [
        [ip_interface(f"10.100.64.{n}/32"), ip_interface(f"fd7a::{n}/128")] for n in (5, 6)
    ]
    with folder() as state_dir:
        async with open_tun("utun", MTU) as tun:
            before = snapshot()
            set_up = functools.partial(tun_network, tun.name, MTU, state_dir=state_dir)

            def routed() -> bool:
                routes = run("ip route", "ip -6 route")
                return all(f"{net} dev {tun.name} proto static" in routes for net in ROUTES)

            async with set_up([], ROUTES):
                assert routed()
                async with AsyncExitStack() as first, AsyncExitStack() as second:
                    await first.enter_async_context(set_up(addresses[0], [], part="first"))
                    await second.enter_async_context(set_up(addresses[1], [], part="second"))
                    assert len(os.listdir(state_dir)) == 3
                    await first.aclose()
                    assert routed()
                    assert "10.100.64.5" not in run("ip addr")
                    assert "10.100.64.6/32" in run("ip addr")
            assert snapshot() == before
            assert os.listdir(state_dir) == []


@in_namespace
def test_killed_with_an_address_over_the_routes() -> None:
    run("ip tuntap add dev kept mode tun vnet_hdr", "ip link set kept mtu 1400")
    before = snapshot()
    with folder() as state_dir:
        child = os.fork()
        if child == 0:
            end_by_itself()

            async def hold() -> None:
                network = functools.partial(tun_network, "kept", MTU, state_dir=state_dir)
                async with (
                    open_tun("kept", MTU),
                    network([], ROUTES),
                    network(ADDRESSES, [], part="10.100.64.5"),
                ):
                    os.kill(os.getpid(), signal.SIGKILL)

            try:
                trio.run(hold)
            finally:
                os._exit(1)
        os.waitpid(child, 0)
        assert "10.100.64.5/18" in run("ip addr")
        assert trio.run(repair, state_dir) == 2
        assert snapshot() == before
        assert os.listdir(state_dir) == []


async def test_repair_of_another_boot_or_namespace(tmp_path: Path) -> None:
    record = journal.Record(
        interface="utun0",
        index=1,
        namespace=journal.namespace(),
        boot_id=journal.boot_id(),
        addresses=(),
        routes=(),
        before=journal.LinkSettings(False, 1500, 500, 65_536, 0, {}),
    )
    journal.write(tmp_path, attrs.evolve(record, boot_id="another")).release()
    assert await repair(tmp_path) == 0
    assert os.listdir(tmp_path) == []
    journal.write(tmp_path, attrs.evolve(record, namespace=1)).release()
    assert await repair(tmp_path) == 0
    assert os.listdir(tmp_path) == ["tun-1-utun0.json"]


async def test_nothing_to_repair(tmp_path: Path) -> None:
    assert await repair(tmp_path / "not-there") == 0


def test_networks_of_both_families_do_not_mix() -> None:
    assert find_conflict([IPv4Network("0.0.0.0/0")], [Occupied(ROUTES[1], "", "")]) is None
