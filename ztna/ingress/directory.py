"""Which service a local program means: by id, by name, by virtual address.

Names are `<service>.ztna.internal`, or the bare id; case does not matter (RFC 4343), but where two
ids differ in nothing else, the exact one is meant.
"""

import ipaddress
from collections.abc import Iterable

import attrs

from ztna.core.addresses import packed_pair
from ztna.core.routes import ServiceRoute
from ztna.core.wire import SERVICE_DOMAIN
from ztna.ingress.host import Target


@attrs.define
class Directory:
    """Services by what they may be called."""

    _by_name: dict[str, ServiceRoute] = attrs.Factory(dict)
    _by_address: dict[bytes, ServiceRoute] = attrs.Factory(dict)

    @classmethod
    def of(cls, services: Iterable[ServiceRoute]) -> "Directory":
        """The names and addresses of these services."""
        directory = cls()
        directory.set_services(services)
        return directory

    def set_services(self, services: Iterable[ServiceRoute]) -> None:
        """Know these services, and no others."""
        known = list(services)
        names = {service.id.lower(): service for service in reversed(known)}
        self._by_name = names | {service.id: service for service in known}
        self._by_address = {a: s for s in known for a in packed_pair(s.virtual_ip)}

    def find(self, host: str, port: int) -> Target | None:
        """The target that a program means by a name or an address; None if there is none."""
        try:
            packed = ipaddress.ip_address(host).packed
        except ValueError:
            return self._find_name(host, port)
        service = self._by_address.get(packed)
        return None if service is None else Target(service.id, packed, port)

    def _find_name(self, name: str, port: int) -> Target | None:
        name = name.removesuffix(".")
        if name.lower().endswith(SERVICE_DOMAIN):
            name = name[: -len(SERVICE_DOMAIN)]
        service = self._by_name.get(name) or self._by_name.get(name.lower())
        return None if service is None else Target(service.id, service.virtual_ip.packed, port)
