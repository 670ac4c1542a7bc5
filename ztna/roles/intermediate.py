"""The intermediate: registry, observed addresses, and the relay between sessions.

`run_intermediate` listens; each verified client gets a `_serve_client` of its own, for as long as
its session lives. What the two say to each other is in `roles.client_dialogue`.
"""

import functools
import ipaddress
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import structlog
import trio

from ztna.config.model import IntermediateConfig
from ztna.config.tcp import TcpConfig
from ztna.core import wire
from ztna.core.addresses import format_address, is_virtual, packed_pair
from ztna.core.allocation import AddressesExhaustedError
from ztna.core.channels import ChannelTable
from ztna.core.error_groups import leaves
from ztna.core.identity import Role
from ztna.core.messages import (
    Goodbye,
    ProtocolError,
    encode_message,
)
from ztna.core.policy_document import SignedDocument
from ztna.core.ports import UdpPort
from ztna.core.registry import Client, Registry
from ztna.core.relay import Relay
from ztna.core.rendezvous import Rendezvous
from ztna.core.stun_server import StunServer
from ztna.errors import CONTAINED, RemoteProtocolError, SessionClosedError, SystemSetupError
from ztna.net.aioquic_private.mutual_tls import utc_now
from ztna.net.closing import CloseCode
from ztna.net.endpoint import Endpoint
from ztna.net.keyed_ids import OUR_IDS, Given
from ztna.net.session import Session
from ztna.net.session_settings import SessionSettings
from ztna.net.stateless_reset import ResetKey, load_reset_key
from ztna.net.stream_listener import StreamEntrance, StreamListener
from ztna.net.stream_port import open_stream_port
from ztna.net.stun import StunAddresses, StunResponder, open_stun_responder
from ztna.net.tcp_socket import open_tcp_source
from ztna.net.udp import open_udp_port
from ztna.pki import Credentials
from ztna.policy_key import PolicyKeys
from ztna.roles.address_book import AddressBook, open_address_book
from ztna.roles.client_dialogue import read_control, receive_datagrams, reconcile
from ztna.roles.control_client import REPLACED_WAIT
from ztna.roles.expiry import close_when_expired
from ztna.roles.intermediate_view import IntermediateView
from ztna.roles.judgement import apply_files, apply_policy, policy_of
from ztna.roles.local import Serve, status_server
from ztna.roles.reload import (
    NodeFiles,
    ReadFiles,
    keep_reloading,
    read_files,
    reader,
)
from ztna.roles.served import Intermediate, Served
from ztna.roles.tree import statistics_registry

log = structlog.get_logger(__name__)

# `bind` of this is IPv4 as well.
ALL_ADDRESSES = ipaddress.IPv6Address("::")
CLIENT_ROLES = frozenset({Role.AGENT, Role.CONNECTOR})
# Seconds, our choice: what a client needs to register after its handshake, one loss included.
REGISTRATION_PATIENCE = 3.0


async def run_intermediate_from_config(
    config: IntermediateConfig, read_config: Callable[[], IntermediateConfig]
) -> None:
    """Serve until cancelled, with real sockets and the files that the configuration names.

    read_config: reads the configuration again, for a reload.
    """
    files = read_files(config, Role.INTERMEDIATE)
    async with AsyncExitStack() as stack:
        book = await stack.enter_async_context(
            open_address_book(config.state_dir / "intermediate.sqlite", config.tunnel_range)
        )
        reset_key = await trio.to_thread.run_sync(load_reset_key, config.state_dir / "reset.key")
        udp = await stack.enter_async_context(
            open_udp_port(
                str(config.bind),
                config.port,
                dual=config.bind == ALL_ADDRESSES,
                server=True,
                sorted_by=OUR_IDS,
            )
        )
        stun = await stack.enter_async_context(open_stun_responder(udp, _stun_addresses(config)))
        entrance = None
        if config.tcp is not None:
            entrance = await stack.enter_async_context(_open_entrance(config, config.tcp, udp))
        await run_intermediate(
            config,
            udp,
            files.credentials,
            book,
            reset_key=reset_key,
            stun=stun,
            denied_serials=files.denied_serials,
            read=reader(read_config, Role.INTERMEDIATE),
            policy=files.policy,
            policy_keys=files.policy_keys,
            entrance=entrance,
            serve=status_server(None, Role.INTERMEDIATE, config.state_dir),
        )


@asynccontextmanager
async def _open_entrance(
    config: IntermediateConfig, tcp: TcpConfig, udp: UdpPort
) -> AsyncGenerator[StreamEntrance, None]:
    """Where TLS comes in, beside a UDP port."""
    async with (
        open_tcp_source(str(tcp.bind or config.bind), tcp.port) as source,
        open_stream_port(udp) as port,
    ):
        log.info("TLS for networks that block UDP", address=format_address(source.local_address))
        yield StreamEntrance(port, source)


def _stun_addresses(config: IntermediateConfig) -> StunAddresses:
    def text(address: object) -> str | None:
        return None if address is None else str(address)

    return StunAddresses(
        text(config.external_ip),
        config.stun.alternate_port,
        text(config.stun.alternate_ip),
        text(config.stun.alternate_external_ip),
    )


async def run_intermediate(
    config: IntermediateConfig,
    port: UdpPort,
    credentials: Credentials,
    addresses: AddressBook,
    *,
    reset_key: ResetKey | None = None,
    stun: StunResponder | None = None,
    denied_serials: frozenset[int] = frozenset(),
    read: ReadFiles[IntermediateConfig] | None = None,
    policy: SignedDocument | None = None,
    policy_keys: PolicyKeys | None = None,
    entrance: StreamEntrance | None = None,
    serve: Serve | None = None,
    task_status: trio.TaskStatus[Intermediate] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve clients on one port until cancelled.

    read: gives the files anew for a reload. policy: the signed one, instead of the configuration's.
    entrance: where TLS comes in, beside this port. serve: answers those who ask what it sees.
    """
    files = NodeFiles(config, credentials, denied_serials, policy_keys, policy)
    registry = Registry(policy_of(files), config.service_range)
    registry.reserved = {
        packed: identity
        for identity, address in addresses.by_identity.items()
        for packed in packed_pair(address)
    }
    rendezvous = Rendezvous(registry, ChannelTable(new_channel=_new_channel))
    intermediate = Intermediate(
        registry,
        Relay(registry, plain=config.plain_relay),
        rendezvous,
        addresses,
        port if entrance is None else entrance.port,
        denied_serials=denied_serials,
        plain_relay=config.plain_relay,
    )
    if entrance is not None:
        port = intermediate.streams = entrance.port
    statistics_registry().register("intermediate", intermediate.statistics)
    statistics_registry().register("udp", port.statistics)
    async with trio.open_nursery() as nursery:
        apply_policy(intermediate, nursery, files)
        stun = stun or StunResponder(StunServer(port.local_address), port)
        statistics_registry().register("stun", stun.statistics)
        nursery.start_soon(stun.run)
        endpoint = Endpoint(port, reset_key=reset_key, stun=stun.answer, relay=intermediate.forward)
        await nursery.start(endpoint.run)
        statistics_registry().register("endpoint", endpoint.statistics)
        sessions = endpoint.listen(
            credentials,
            CLIENT_ROLES,
            SessionSettings(),
            denied_serials=lambda: intermediate.denied_serials,
        )
        nursery.start_soon(_keep_time, intermediate)
        if entrance is not None:
            listener = StreamListener(
                entrance.port,
                lambda: endpoint.credentials,
                CLIENT_ROLES,
                lambda: intermediate.denied_serials,
                utc_now,
            )
            statistics_registry().register("tcp", listener.statistics)
            nursery.start_soon(listener.run, entrance.source)
        if serve is not None:
            view = IntermediateView(intermediate, format_address(port.local_address), endpoint)
            nursery.start_soon(serve, view.answer)
        if read is not None:
            apply = functools.partial(apply_files, intermediate, endpoint, nursery)
            nursery.start_soon(keep_reloading, files, read, apply)
        log.info(
            "ready", address=format_address(port.local_address), identity=credentials.identity.uri
        )
        task_status.started(intermediate)
        async for session in sessions:
            nursery.start_soon(_serve_client, intermediate, session)
            del session  # the last one is kept by its task alone, too


def _new_channel() -> bytes:
    """Of a form that the kernel tells from made-up ones (`net.keyed_ids`)."""
    return OUR_IDS.make(Given.TO_PEERS)


async def _keep_time(intermediate: Intermediate) -> None:
    """Run the timer of the rendezvous."""
    while True:
        intermediate.introduced = trio.Event()
        due = intermediate.rendezvous.get_timer()
        with trio.move_on_at(math.inf if due is None else due) as timer:
            await intermediate.introduced.wait()
        if timer.cancelled_caught:
            intermediate.rendezvous.handle_timer(trio.current_time())
            intermediate.introduce()


async def _serve_client(intermediate: Intermediate, session: Session) -> None:
    """One verified client, from its first message to the end of its session."""
    peer = session.peer
    if not intermediate.admits(peer.identity, trio.current_time()):
        session.close(CloseCode.LIMIT, "too many sessions of this identity in a short time")
        return
    intermediate.next_key += 1
    size = session.max_datagram_data
    client = Client(intermediate.next_key, peer.identity, size, verified=peer)
    served = Served(client, session)
    channels = intermediate.rendezvous.channels
    channels.set_address(client.key, session.remote_address)
    replaced = intermediate.registry.add(client)
    intermediate.relay.add(client)
    intermediate.served[client.key] = served
    with structlog.contextvars.bound_contextvars(client=str(peer.identity)):
        log.info("client connected", address=intermediate.where(session))
        if replaced is not None:
            intermediate.rendezvous.replaced(replaced, client)
            _replace(intermediate, replaced)
        try:
            async with trio.open_nursery() as nursery:
                # `awaited` is read before the first registration, which may be here already.
                nursery.start_soon(_settle_later, intermediate, client, client.awaited)
                session.deliver_datagrams(
                    functools.partial(receive_datagrams, intermediate, served)
                )
                nursery.start_soon(_report_address, intermediate, served)
                nursery.start_soon(_end_with_stream, intermediate, session)
                nursery.start_soon(close_when_expired, session)
                nursery.start_soon(read_control, intermediate, served)
                await session.wait_closed()
                nursery.cancel_scope.cancel()
        except* SessionClosedError:
            pass  # the reason is logged below, once for all ways to end
        except* RemoteProtocolError as group:
            reason = _words(group)
            session.send_control(encode_message(ProtocolError(reason)))
            session.close(CloseCode.PROTOCOL_ERROR, reason)
        except* (AddressesExhaustedError, SystemSetupError) as group:
            log.error("no tunnel address for a client", error=_words(group))
            session.close(CloseCode.LIMIT, "the intermediate has no tunnel address to give")
        except* CONTAINED as group:
            # A bug that one client can reach must not end the sessions of all others.
            log.exception("internal error in a session", error=_words(group))
            session.close(CloseCode.GOODBYE, "internal error of the intermediate")
        finally:
            intermediate.registry.remove(client)
            intermediate.relay.remove(client)
            intermediate.served.pop(client.key, None)
            intermediate.rendezvous.gone(client, trio.current_time())
            intermediate.inner.forget(client.key)
            intermediate.introduce()
        closed = await session.wait_closed()
        unlogged = {"lines_suppressed": served.unlogged} if served.unlogged else {}
        log.info("client gone", reason=closed.reason, by_peer=closed.by_peer, **unlogged)


def _words(group: BaseException) -> str:
    return "; ".join(str(error) or type(error).__name__ for error in leaves(group))


def _replace(intermediate: Intermediate, replaced: Client) -> None:
    """The newest session of an identity wins; the older one is told to stay away for a while."""
    intermediate.relay.remove(replaced)
    served = intermediate.served.pop(replaced.key, None)
    if served is None:
        return
    log.warning("replaced by a newer session", old=intermediate.where(served.session))
    if replaced.speaks_control:
        served.session.send_control(encode_message(Goodbye("replaced", REPLACED_WAIT)))
    served.session.close(CloseCode.REPLACED, "replaced by a newer session of this identity")


async def _settle_later(
    intermediate: Intermediate, client: Client, awaited: frozenset[str]
) -> None:
    """Whoever registers nothing anew must not keep others waiting."""
    await trio.sleep(REGISTRATION_PATIENCE)
    client.settled = True
    intermediate.registry.settle(client)
    lost = [each for each in awaited if each not in client.provides]
    # Those of a client without Hello could not be used, nor refused, until now.
    waiting = [] if client.speaks_control else [*client.provides]
    if not client.is_agent:
        reconcile(intermediate, client, [*waiting, *lost])


async def _report_address(intermediate: Intermediate, served: Served) -> None:
    """OBSERVED_ADDRESS, now and on every change; not over a stream, which shows no UDP mapping. The
    relay's channels move with the session."""
    session = served.session
    while True:
        address = session.remote_address
        intermediate.rendezvous.channels.set_address(served.client.key, address)
        if not is_virtual(address):
            session.send_datagrams([wire.encode_observed_address(address)])
        await session.wait_address_change(address)
        intermediate.rendezvous.channels.set_address(served.client.key, session.remote_address)
        intermediate.rendezvous.moved(served.client, trio.current_time())
        intermediate.introduce()


async def _end_with_stream(intermediate: Intermediate, session: Session) -> None:
    """A session whose stream has ended will not be heard of again: its client begins another."""
    streams = intermediate.streams
    stream = None if streams is None else streams.stream(session.remote_address)
    if stream is not None:
        await stream.closed.wait()
        session.close(CloseCode.GOODBYE, f"its TLS connection has ended: {stream.reason}")
