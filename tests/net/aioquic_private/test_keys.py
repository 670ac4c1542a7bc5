"""Which receive keys a packet is opened with, over key updates."""

import os

import pytest
from aioquic._crypto import CryptoError
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.packet import QuicProtocolVersion
from aioquic.tls import CipherSuite

from ztna.net.aioquic_private.keys import KeptKeys

CID = bytes(8)


def make() -> tuple[CryptoPair, KeptKeys]:
    """A sender of plain aioquic, and a receiver that knows its secret."""
    sender, receiver = CryptoPair(), CryptoPair()
    for context in (sender.send, sender.recv, receiver.send, receiver.recv):
        context.setup(
            cipher_suite=CipherSuite.AES_128_GCM_SHA256,
            secret=SECRET,
            version=QuicProtocolVersion.VERSION_1,
        )
    return sender, KeptKeys(receiver, 0)


SECRET = os.urandom(32)


def packet(sender: CryptoPair, number: int) -> bytes:
    """A packet of plain aioquic's, with 2 bytes of packet number."""
    first = 0x41 | sender.send.key_phase << 2
    header = bytes((first,)) + CID + (number & 0xFFFF).to_bytes(2, "big")
    return sender.encrypt_packet(header, b"hello, world", number)


def opens(keys: KeptKeys, data: bytes, expected: int) -> int:
    """The packet number."""
    _, payload, number = keys.decrypt_packet(data, 9, expected)
    assert payload == b"hello, world"
    return number


def test_phases_are_told_apart_by_number() -> None:
    sender, keys = make()
    assert opens(keys, packet(sender, 1), 1) == 1
    old = packet(sender, 2)
    sender._update_key("local_update")
    assert opens(keys, packet(sender, 9), 2) == 9
    assert keys.updates == 1
    assert opens(keys, packet(sender, 5), 10) == 5
    assert keys.lowest_opened == 5
    assert opens(keys, old, 10) == 2
    assert keys.keys_for(0, 4) is keys.previous
    # RFC 9001 section 6.4: no old keys above a number that had newer ones.
    assert keys.keys_for(0, 5) is keys.following
    assert keys.keys_for(1, 5) is keys.recv
    assert keys.failed == 0


def test_two_updates_in_a_row() -> None:
    sender, keys = make()
    older = packet(sender, 1)
    sender._update_key("local_update")
    old = packet(sender, 2)
    assert opens(keys, packet(sender, 3), 0) == 3
    sender._update_key("local_update")
    assert opens(keys, packet(sender, 4), 4) == 4
    assert keys.updates == 2
    assert opens(keys, old, 5) == 2
    with pytest.raises(CryptoError):
        opens(keys, older, 5)
    assert keys.failed == 1
    assert keys.updates == 2


def test_forged_phase_bit_changes_nothing() -> None:
    sender, keys = make()
    data = bytearray(packet(sender, 1))
    data[0] ^= 0x04
    with pytest.raises(CryptoError):
        opens(keys, bytes(data), 1)
    assert (keys.updates, keys.recv.key_phase, keys.failed) == (0, 0, 1)


def test_update_that_was_asked_for_starts_with_the_next_packet() -> None:
    _, keys = make()
    keys.update_key()
    asked = keys.update_requested
    header = b"\x45" + CID + bytes(2)
    keys.encrypt_packet(header, b"hello, world", 7)
    assert (asked, keys.update_requested) == (True, False)
    assert (keys.updates, keys.first_sealed, keys.sealed, keys.send.key_phase) == (1, 7, 1, 1)


def test_nothing_opens_after_teardown() -> None:
    sender, keys = make()
    keys.update_now()
    keys.teardown()
    assert keys.previous is None
    with pytest.raises(CryptoError):
        opens(keys, packet(sender, 1), 1)
    assert keys.failed == 0
