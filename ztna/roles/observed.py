"""As whom an intermediate sees us: the addresses that it reports to several control sessions (QAD).

Sessions of one socket should all be seen under one address; those of other sockets show how the NAT
chooses ports. The sessions end at once. They count as any other: the newest session of an
identity replaces the older one, so a node that runs with the same certificate loses its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack

import attrs
import trio

from ztna.core import wire
from ztna.core.identity import Role
from ztna.core.natclass import MappingSample
from ztna.core.ports import Address
from ztna.errors import UnreachableError
from ztna.net.closing import CloseCode
from ztna.net.endpoint import Endpoint
from ztna.net.session import Session
from ztna.net.udp import open_udp_port
from ztna.pki import Credentials

# Our choice: enough to see a pattern of ports; each session costs the server a handshake.
SESSIONS_OF_ONE_SOCKET = 3
OTHER_SOCKETS = 2
# Our choice: QUIC sends an unanswered Initial again after 0.4, 1.2 and 2.8 s.
DEADLINE = 4.0


@attrs.frozen(slots=True)
class ServerName:
    """An intermediate's address, and the name that its certificate must hold."""

    address: Address
    name: str


async def observed_addresses(
    servers: Sequence[ServerName], credentials: Credentials, source_host: str
) -> list[MappingSample]:
    """One sample a session, in the order in which they were opened.

    source_host: this machine's address towards the servers. Raises UnreachableError, RefusedError
    and SessionClosedError.
    """
    samples = []
    for number in range(1 + OTHER_SOCKETS):
        async with AsyncExitStack() as stack:
            port = await stack.enter_async_context(open_udp_port(source_host, 0))
            endpoint = Endpoint(port)
            nursery = await stack.enter_async_context(trio.open_nursery())
            await nursery.start(endpoint.run)
            for server in servers:
                for _ in range(1 if number else SESSIONS_OF_ONE_SOCKET):
                    mapped = await _observe(endpoint, server, credentials)
                    samples.append(MappingSample(port.local_address, server.address, mapped))
            nursery.cancel_scope.cancel()
    return samples


async def _observe(endpoint: Endpoint, server: ServerName, credentials: Credentials) -> Address:
    session = endpoint.connect(server.address, credentials, server.name, [Role.INTERMEDIATE])
    try:
        with trio.fail_after(DEADLINE):
            await session.wait_verified()
            return await _first_report(session)
    except trio.TooSlowError:
        host, port = server.address
        raise UnreachableError(
            f"no session with {host} port {port} within {DEADLINE:g} s; is it an intermediate, "
            f"and does UDP reach it?"
        ) from None
    finally:
        session.close(CloseCode.GOODBYE, "the address was observed")


async def _first_report(session: Session) -> Address:
    while True:
        for message in await session.receive_datagrams():
            if message[:1] in {b"\x01", b"\x02"}:
                return wire.parse_observed_address_untrusted(message)


def port_consistency(samples: Sequence[MappingSample]) -> str:
    """In words, what the sessions of one socket and those of several have shown."""
    return "; ".join(_consistency(samples))


def _consistency(samples: Sequence[MappingSample]) -> Iterator[str]:
    first = [sample for sample in samples if sample.local == samples[0].local]
    seen = {sample.mapped for sample in first}
    towards = len({sample.destination for sample in first})
    what = f"{len(first)} connections of one socket" + (f" to {towards} servers" * (towards > 1))
    yield f"{what} were seen as {len(seen)} address{'es' * (len(seen) > 1)}"
    others = {sample.local: sample.mapped for sample in samples}
    kept = sum(local[1] == mapped[1] for local, mapped in others.items())
    yield f"{kept} of {len(others)} sockets kept their port"
