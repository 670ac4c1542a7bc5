"""The HTTP proxy towards the intermediate: which one, and who looks up which name."""

import contextlib
import ipaddress
from collections.abc import Mapping

import structlog

from ztna.config.model import IntermediateAddress
from ztna.config.proxy import proxy_of_environment
from ztna.core.http_connect import Proxy
from ztna.errors import ConfigError, UnresolvedError
from ztna.roles.resolve import resolve

log = structlog.get_logger(__name__)


def proxy_towards(there: IntermediateAddress, environment: Mapping[str, str]) -> Proxy | None:
    """The proxy of the file, or else of the environment. One of the environment that we do not
    speak is told and left alone: it is there for other programs."""
    proxy = there.proxy
    if there.tcp_port is None:
        return None
    if proxy is None:
        try:
            proxy = proxy_of_environment(there.host, environment)
        except ConfigError as error:
            log.warning("proxy is not used", reason=str(error))
    if proxy is not None:
        log.info("TLS would go through a proxy", proxy=str(proxy), source=proxy.source)
    return proxy


async def look_up(there: IntermediateAddress, proxy: Proxy | None) -> list[str]:
    """IP addresses that must be reached outside the tunnel, as far as they are known at the start.
    Raises UnresolvedError, so that a wrong name is told at once; not where a proxy may know it."""
    found: list[str] = []
    try:
        found.append((await resolve(there.host, there.port))[0])
    except UnresolvedError as error:
        if proxy is None:
            raise
        log.warning("only the proxy can know the intermediate's name", reason=str(error))
    if proxy is not None:
        with contextlib.suppress(ValueError):  # a name, which is looked up for each connection
            found.append(str(ipaddress.ip_address(proxy.host)))
    return found
