"""What an endpoint answers to those that it has no session with, and how often.

Version Negotiation (RFC 9000 section 6), Retry (section 8.1.2) and stateless resets (section 10.3):
all without memory of the stranger, and none larger than what it sent.
"""

from collections.abc import Callable, Set

import attrs
import trio
from aioquic.quic.packet import encode_quic_retry, encode_quic_version_negotiation
from aioquic.quic.retry import QuicRetryTokenHandler

from ztna.core.identity import Role
from ztna.core.limits import RateGate, SourceLimiter, TokenBucket
from ztna.core.ports import Address, UdpBatch
from ztna.errors import RemoteProtocolError
from ztna.net.demux import QUIC_VERSION_1, LongHeader, initial_token_untrusted
from ztna.net.keyed_ids import OUR_IDS, Given
from ztna.net.session import Session
from ztna.net.session_settings import SessionSettings
from ztna.net.stateless_reset import SMALLEST, ResetKey
from ztna.pki import Credentials

# Our choice. A handshake costs a few milliseconds of CPU, most for signatures: one address, perhaps
# of a carrier's NAT, gets enough for many clients that come back at once; all together leave
# most of a core to the sessions that are up.
HANDSHAKE_RATE = 50.0
HANDSHAKE_BURST = 256.0
ALL_HANDSHAKES_RATE = 150.0
ALL_HANDSHAKES_BURST = 1024.0
# Our choice, of a peer's virtual address: of one agent, which needs a session, and now and then a
# second one beside it. An intermediate grants an identity as many.
PEER_HANDSHAKE_RATE = 1.0
PEER_HANDSHAKE_BURST = 30.0
# Our choice. To look at a stranger's first packet, and answer it by Retry or Version Negotiation,
# takes some 30 us: a twentieth of a core at this rate, whatever comes.
GREETING_RATE = 100.0
GREETING_BURST = 512.0
ALL_GREETINGS_RATE = 2000.0
ALL_GREETINGS_BURST = 4000.0


@attrs.frozen
class ProvenIds:
    """The connection ids of a client's handshake: what it sent first, and what a Retry of ours
    told it to use, None without one (RFC 9000 section 7.3)."""

    original: bytes
    retry: bytes | None


def _handshakes(rate: float, burst: float) -> SourceLimiter:
    total = TokenBucket(ALL_HANDSHAKES_RATE, ALL_HANDSHAKES_BURST)
    return SourceLimiter(rate, burst, total=total)


@attrs.define
class Doorkeeper:
    """Makes the answers. resets: stateless resets a second at most. greetings: how
    often a first packet is looked at. handshakes: how often a new session may begin."""

    reset_key: ResetKey | None
    resets: float
    handshakes: SourceLimiter = attrs.Factory(lambda: _handshakes(HANDSHAKE_RATE, HANDSHAKE_BURST))
    greetings: SourceLimiter = attrs.Factory(
        lambda: SourceLimiter(
            GREETING_RATE,
            GREETING_BURST,
            total=TokenBucket(ALL_GREETINGS_RATE, ALL_GREETINGS_BURST),
        )
    )
    _tokens: QuicRetryTokenHandler = attrs.Factory(QuicRetryTokenHandler)
    _reset_gate: RateGate = attrs.field(
        default=attrs.Factory(lambda self: RateGate(self.resets, self.resets), takes_self=True)
    )

    def meet_peers_alone(self) -> None:
        """All that come are peers, each with an address of its own."""
        self.handshakes = _handshakes(PEER_HANDSHAKE_RATE, PEER_HANDSHAKE_BURST)

    def forget(self, address: Address) -> None:
        """A virtual address that is given up."""
        self.handshakes.forget(address[0])
        self.greetings.forget(address[0])

    def version_negotiation(self, header: LongHeader, address: Address) -> UdpBatch:
        """RFC 9000 section 6.1; the bit 0x40 set, as this port tells QUIC by it."""
        packet = bytearray(
            encode_quic_version_negotiation(
                source_cid=header.destination_cid,
                destination_cid=header.source_cid,
                supported_versions=[QUIC_VERSION_1],
            )
        )
        packet[0] |= 0xC0
        return UdpBatch(bytes(packet), len(packet), address)

    def retry(self, header: LongHeader, address: Address, now: float) -> UdpBatch:
        """The client comes again, with a token that only its address can have received."""
        source_cid = OUR_IDS.make(Given.TO_ANYBODY)
        token = self._tokens.create_token(
            address=address,
            original_destination_connection_id=header.destination_cid,
            retry_source_connection_id=source_cid,
            now=now,
        )
        packet = encode_quic_retry(
            version=header.version,
            source_cid=source_cid,
            destination_cid=header.source_cid,
            original_destination_cid=header.destination_cid,
            retry_token=token,
        )
        return UdpBatch(packet, len(packet), address)

    def proven_ids_untrusted(
        self, header: LongHeader, batch: UdpBatch, now: float
    ) -> ProvenIds | None:
        """What the token of an Initial proves; None if it brings none.

        Raises RemoteProtocolError for a token that is not ours, late, or another address's.
        """
        token = initial_token_untrusted(batch.data, header)
        if not token:
            return None
        try:
            original = self._tokens.validate_token(
                address=batch.address, destination_cid=header.destination_cid, token=token, now=now
            )
        except ValueError as error:
            raise RemoteProtocolError(f"Retry token: {error}") from error
        return ProvenIds(original, header.destination_cid)

    def reset(
        self, connection_id: bytes, received_size: int, address: Address, now: float
    ) -> UdpBatch | None:
        """Tell a client that its session is forgotten; None without a key, or too often."""
        if self.reset_key is None or received_size <= SMALLEST or not self._reset_gate.allow(now):
            return None
        packet = self.reset_key.build(connection_id, received_size)
        assert packet is not None, "what is large enough is answered"
        return UdpBatch(packet, len(packet), address)


@attrs.define(eq=False)
class Listener:
    """How clients are met: what `Endpoint.listen` was given."""

    credentials: Credentials
    expected_roles: frozenset[Role]
    settings: SessionSettings
    denied_serials: Callable[[], Set[int]]
    accepted: trio.MemorySendChannel[Session]
    peers_only: bool = False
