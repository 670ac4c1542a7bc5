"""What services may be called."""

import ipaddress

import pytest

from ztna.core.addresses import twin
from ztna.core.routes import ServiceRoute
from ztna.ingress.directory import Directory
from ztna.ingress.host import Target

WEB_IP, OTHER_IP = ipaddress.IPv4Address("10.100.0.2"), ipaddress.IPv4Address("10.100.0.3")
DIRECTORY = Directory.of([ServiceRoute("web", WEB_IP), ServiceRoute("Web", OTHER_IP)])
WEB, OTHER = Target("web", WEB_IP.packed, 80), Target("Web", OTHER_IP.packed, 80)


@pytest.mark.parametrize(
    ("host", "target"),
    [
        ("web", WEB),
        ("Web", OTHER),
        ("WEB", WEB),  # of two that differ in case alone, the first
        ("web.", WEB),
        ("web.ztna.internal", WEB),
        ("Web.ZTNA.Internal.", OTHER),
        ("10.100.0.2", WEB),
        (str(twin(OTHER_IP)), Target("Web", twin(OTHER_IP).packed, 80)),
        ("web.ztna.internal.example.net", None),
        (".ztna.internal", None),
        ("", None),
        ("10.100.0.4", None),
        ("::1", None),
        ("010.100.0.2", None),
    ],
)
def test_find(host: str, target: Target | None) -> None:
    assert DIRECTORY.find(host, 80) == target


def test_services_may_change() -> None:
    directory = Directory.of([ServiceRoute("web", WEB_IP)])
    directory.set_services([ServiceRoute("web", OTHER_IP), ServiceRoute("new", WEB_IP)])
    assert directory.find("web", 1) == Target("web", OTHER_IP.packed, 1)
    assert directory.find("10.100.0.2", 1) == Target("new", WEB_IP.packed, 1)
    directory.set_services([])
    assert directory.find("web", 1) is None
