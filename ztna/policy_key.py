"""The policy key: signs the policy where it is written, and verifies it on every node.

EdDSA with Ed25519 (RFC 8032). `create_policy_key` once, beside the CA and away from every
intermediate; `sign_policy` for each new document; `PolicyKeys`, the public halves that a node has
pinned, opens what is signed. docs/protocol.md section 7 has the bytes.
"""

import re
from contextlib import suppress
from pathlib import Path

import attrs
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from ztna.core.policy_document import (
    MAX_DOCUMENT,
    PolicyDocument,
    SignedDocument,
    parse_policy_untrusted,
)
from ztna.errors import IdentityError, RemoteProtocolError
from ztna.pki import (
    MALFORMED,
    private_key_pem,
    read_file,
    read_private_key,
    write_new,
    write_public,
)

# What is signed begins so: a signature of this key for anything else is none for a policy.
PREFIX = b"ztna-policy-v1\0"
# Bytes; a public key takes 113, and while keys change a file holds two.
MAX_KEY_FILE = 16_384
# A document in base64, its signature, and what is around both.
MAX_SIGNED_FILE = MAX_DOCUMENT * 2
_PUBLIC_KEY = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----\n?", re.DOTALL)


class NotSignedError(RemoteProtocolError):
    """A signed policy whose signature is not of a key that is pinned here."""


@attrs.frozen(eq=False)
class PolicyKeys:
    """Public keys of which each may have signed the policy: one, or two while it changes."""

    keys: tuple[ed25519.Ed25519PublicKey, ...]

    def open_untrusted(self, signed: SignedDocument) -> PolicyDocument:
        """The document, if one of these keys has signed it. Raises RemoteProtocolError; nothing of
        the document is read before its signature is found good."""
        self.verify(signed)
        return parse_policy_untrusted(signed.document)

    def verify(self, signed: SignedDocument) -> None:
        """Raises NotSignedError if none of these keys has signed it."""
        for key in self.keys:
            with suppress(InvalidSignature):
                return key.verify(signed.signature, PREFIX + signed.document)
        raise NotSignedError("it is not signed by the policy key that is pinned here")


def create_policy_key(directory: Path) -> None:
    """Make policy.key (0600) and policy.pub. Raises IdentityError if the key is there already."""
    key = ed25519.Ed25519PrivateKey.generate()
    write_new(directory / "policy.key", private_key_pem(key), mode=0o600)
    write_public(directory / "policy.pub", public_key_pem(key.public_key()))


def public_key_pem(key: ed25519.Ed25519PublicKey) -> bytes:
    """SubjectPublicKeyInfo (RFC 8410 section 4), PEM."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def read_policy_key(path: Path) -> ed25519.Ed25519PrivateKey:
    """The private half, which nobody but its owner may read. Raises IdentityError."""
    key = read_private_key(path)
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise IdentityError(f"{path}: a policy key must be Ed25519 (ztna policy init makes one)")
    return key


def read_policy_keys(path: Path) -> PolicyKeys:
    """The public halves in a PEM file, at least one. Raises IdentityError."""
    keys = []
    for pem in _PUBLIC_KEY.findall(read_file(path, limit=MAX_KEY_FILE)):
        try:
            key = serialization.load_pem_public_key(pem)
        except MALFORMED as error:
            raise IdentityError(f"{path} holds a malformed public key: {error}") from error
        if not isinstance(key, ed25519.Ed25519PublicKey):
            raise IdentityError(f"{path}: a policy key must be Ed25519, as ztna policy init makes")
        keys.append(key)
    if not keys:
        raise IdentityError(f"{path} holds no public key in PEM; policy.pub beside policy.key does")
    return PolicyKeys(tuple(keys))


def sign_policy(key: ed25519.Ed25519PrivateKey, document: bytes) -> SignedDocument:
    """Sign a document's very bytes."""
    return SignedDocument(document, key.sign(PREFIX + document))


def read_signed_policy(path: Path) -> SignedDocument:
    """A file that `ztna policy sign` made; its signature is not yet looked at. Raises
    IdentityError."""
    data = read_file(path, limit=MAX_SIGNED_FILE)
    try:
        return SignedDocument.parse_untrusted(data)
    except RemoteProtocolError as error:
        raise IdentityError(
            f"{path} is no signed policy (ztna policy sign makes one): {error}"
        ) from error
