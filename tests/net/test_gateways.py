"""Which gateway a default route leads to, from the kernel's tables of routes."""

import sys
from pathlib import Path

import pytest
from trio.testing import wait_all_tasks_blocked

from ztna.net import gateways
from ztna.net.port_mapping import open_port_mapping

NONE, LINK_LOCAL, GLOBAL = "0" * 32, "fe80" + "0" * 27 + "1", "2a0e" + "0" * 27 + "9"
PREFIX = "2a0e" + "0" * 28


def route(
    router: str, metric: int, flags: int, link: str, destination: str = NONE, length: str = "00"
) -> str:
    fields = (destination, length, NONE, "00", router, f"{metric:08x}", "1", "0", f"{flags:08x}")
    return " ".join((*fields, link)) + "\n"


@pytest.mark.parametrize(
    ("routes", "router"),
    [
        ([], None),
        ([route(LINK_LOCAL, 1024, 3, "eth0")], "fe80::1%eth0"),
        ([route(LINK_LOCAL, 1024, 3, "eth0"), route(GLOBAL, 100, 3, "eth1")], "2a0e::9"),
        # No gateway; not up; the kernel's own for what has no route; not the default route.
        ([route(NONE, 1024, 1, "tun0")], None),
        ([route(LINK_LOCAL, 1024, 2, "eth0")], None),
        ([route(NONE, 0xFFFFFFFF, 0x200200, "lo")], None),
        ([route(LINK_LOCAL, 1024, 3, "eth0", PREFIX, "40")], None),
    ],
)
def test_default_router(
    routes: list[str], router: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "ipv6_route"
    table.write_text("".join(routes))
    monkeypatch.setattr(gateways, "_ROUTES6", table)
    assert gateways.default_router() == router


def test_a_system_without_ipv6_or_without_such_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateways, "_ROUTES6", tmp_path / "none")
    assert gateways.default_router() is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert gateways.default_router() is None


@pytest.mark.parametrize("ipv6", [False, True])
async def test_a_port_without_ipv6_asks_no_router_of_it(ipv6: bool) -> None:
    asked = []

    def find_router() -> None:
        asked.append("a pinhole")

    async with open_port_mapping(
        4433, ipv6=ipv6, find_gateway=lambda: None, find_router=find_router
    ) as mapping:
        await wait_all_tasks_blocked()
        assert (bool(asked), "ipv6" in mapping.statistics()) == (ipv6, ipv6)
        assert mapping.externals == []
