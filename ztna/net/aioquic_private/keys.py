"""1-RTT keys beside aioquic: the receive keys of three phases, counted for the AEAD limits.

aioquic keeps no old receive keys, so a key update loses what
is in flight; and it counts nothing. `KeptKeys` stands in the place of its 1-RTT CryptoPair, for its
own packets and for those of `fastpath`.

Key phases after RFC 9001 section 6: the phase bit of a packet tells current keys from the others;
of those, numbers below the lowest one opened in this phase belong to the phase before, others to
the next. The keys of the next phase are made in advance (section 9.5).
"""

from aioquic._crypto import CryptoError
from aioquic.quic.crypto import CryptoContext, CryptoPair, apply_key_phase, next_key_phase
from aioquic.quic.packet import decode_packet_number
from aioquic.tls import CipherSuite
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ztna.net.packet_protection import HeaderProtection, PacketKeys

# RFC 9001 section 6.6, AES-GCM: packets sealed with one key, failed openings of a connection.
CONFIDENTIALITY_LIMIT = 1 << 23
INTEGRITY_LIMIT = 1 << 52
# The same section for ChaCha20-Poly1305, whose packets aioquic alone handles.
CHACHA_INTEGRITY_LIMIT = 1 << 36

_AES_GCM = frozenset({CipherSuite.AES_128_GCM_SHA256, CipherSuite.AES_256_GCM_SHA384})


class KeptKeys(CryptoPair):
    """The 1-RTT keys of both directions, with the receive keys of three phases.

    sealed: packets sealed with the current send key. failed: packets that were not authentic, of
    the whole connection. updates: key updates so far.
    first_sealed: number of the first packet sealed in this phase; None before it.
    lowest_opened: smallest number opened in this phase; None before the first.
    """

    def __init__(self, pair: CryptoPair, first_sealed: int) -> None:
        super().__init__()
        self.recv, self.send = pair.recv, pair.send
        self._update_key_requested = pair._update_key_requested
        self.is_gcm = pair.recv.cipher_suite in _AES_GCM and pair.send.cipher_suite in _AES_GCM
        self.sealed = 0
        self.failed = 0
        self.updates = 0
        self.integrity_limit = INTEGRITY_LIMIT if self.is_gcm else CHACHA_INTEGRITY_LIMIT
        self.first_sealed: int | None = first_sealed
        self.lowest_opened: int | None = None
        self.previous: CryptoContext | None = None
        self.following = next_key_phase(self.recv)
        if self.is_gcm:
            self.seal_keys = packet_keys(self.send)
            self.open_keys = packet_keys(self.recv)

    def encrypt_packet(
        self, plain_header: bytes, plain_payload: bytes, packet_number: int
    ) -> bytes:
        """Seal one packet of aioquic's own, after the update that was asked for."""
        protected = super().encrypt_packet(plain_header, plain_payload, packet_number)
        self.count_sealed(packet_number, 1)
        return protected

    def count_sealed(self, first_number: int, count: int) -> None:
        """Note that packets were sealed with the current key."""
        self.sealed += count
        if self.first_sealed is None:
            self.first_sealed = first_number

    def decrypt_packet(
        self, packet: bytes, encrypted_offset: int, expected_packet_number: int
    ) -> tuple[bytes, bytes, int]:
        """Open one packet with the keys of its phase. Raises CryptoError."""
        if not self.recv.is_valid():
            return super().decrypt_packet(packet, encrypted_offset, expected_packet_number)
        assert self.recv.hp is not None
        header, truncated = self.recv.hp.remove(packet, encrypted_offset)
        bits = 8 * ((header[0] & 0x03) + 1)
        number = decode_packet_number(truncated, bits, expected_packet_number)
        keys = self.keys_for(header[0] >> 2 & 1, number)
        assert keys.aead is not None
        try:
            payload = keys.aead.decrypt(packet[len(header) :], header, number)
        except CryptoError:
            self.failed += 1
            raise
        self.opened(keys, number)
        return header, payload, number

    def keys_for(self, phase: int, number: int) -> CryptoContext:
        """The receive keys for a packet, by its key phase bit and number (RFC 9001 section 6.5)."""
        if phase == self.recv.key_phase:
            return self.recv
        if self.previous is not None and (
            self.lowest_opened is None or number < self.lowest_opened
        ):
            return self.previous
        return self.following

    def opened(self, keys: CryptoContext, number: int) -> None:
        """Note an authentic packet; one of the next phase takes both directions there."""
        if keys is self.previous:
            return
        if keys is self.following:
            self._update_key("remote_update")
        if self.lowest_opened is None or number < self.lowest_opened:
            self.lowest_opened = number

    def update_now(self) -> None:
        """Start a key update with the next packet that is sealed."""
        self._update_key("local_update")

    def _update_key(self, trigger: str) -> None:
        previous = CryptoContext(key_phase=self.recv.key_phase)
        previous.aead = self.recv.aead
        # The header protection key stays: apply_key_phase leaves it (RFC 9001 section 6.1).
        apply_key_phase(self.recv, self.following, trigger=trigger)
        apply_key_phase(self.send, next_key_phase(self.send), trigger=trigger)
        self._update_key_requested = False
        self.previous, self.following = previous, next_key_phase(self.recv)
        self.sealed, self.first_sealed, self.lowest_opened = 0, None, None
        self.updates += 1
        if self.is_gcm:
            self.seal_keys = packet_keys(self.send)
            self.open_keys = packet_keys(self.recv)

    @property
    def update_requested(self) -> bool:
        """Whether aioquic was asked for an update that its next packet will start."""
        return self._update_key_requested

    def teardown(self) -> None:
        """Forget the keys."""
        super().teardown()
        self.previous = None


def packet_keys(context: CryptoContext) -> PacketKeys:
    """The AEAD of a context with AES-GCM."""
    assert context.aead is not None
    aead = context.aead._aead
    assert isinstance(aead, AESGCM)
    return PacketKeys(aead, context.aead._iv)


def header_protection(context: CryptoContext) -> HeaderProtection:
    """The header protection of a context with AES."""
    assert context.hp is not None
    return HeaderProtection(context.hp._encryptor)
