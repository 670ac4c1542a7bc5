"""The policy key: what it signs, what it refuses, and its files."""

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from tests.core.test_policy_document import document
from ztna.core.policy_document import SignedDocument
from ztna.errors import IdentityError, RemoteProtocolError
from ztna.pki import private_key_pem
from ztna.policy_key import (
    PolicyKeys,
    create_policy_key,
    public_key_pem,
    read_policy_key,
    read_policy_keys,
    read_signed_policy,
    sign_policy,
)

KEY = ed25519.Ed25519PrivateKey.generate()
OTHER = ed25519.Ed25519PrivateKey.generate()
KEYS = PolicyKeys((KEY.public_key(),))


def test_files_of_a_new_key(tmp_path: Path) -> None:
    create_policy_key(tmp_path)
    assert stat.S_IMODE((tmp_path / "policy.key").stat().st_mode) == 0o600
    signed = sign_policy(read_policy_key(tmp_path / "policy.key"), document())
    policy = read_policy_keys(tmp_path / "policy.pub").open_untrusted(signed)
    assert policy.serial == 7
    with pytest.raises(IdentityError, match="is there already and stays"):
        create_policy_key(tmp_path)


def test_what_is_signed_is_the_prefix_and_the_very_bytes() -> None:
    signed = sign_policy(KEY, document())
    KEY.public_key().verify(signed.signature, b"ztna-policy-v1\0" + document())
    assert KEYS.open_untrusted(signed).serial == 7


@pytest.mark.parametrize(
    "signed",
    [
        sign_policy(OTHER, document()),
        SignedDocument(document(serial=8), sign_policy(KEY, document()).signature),
        SignedDocument(document() + b" ", sign_policy(KEY, document()).signature),
        SignedDocument(document()[:-1], sign_policy(KEY, document()).signature),
        SignedDocument(document(), KEY.sign(document())),
        SignedDocument(document(), bytes(64)),
    ],
    ids=["another key", "another document", "longer", "shorter", "no prefix", "zeros"],
)
def test_what_is_not_signed_by_the_key(signed: SignedDocument) -> None:
    with pytest.raises(RemoteProtocolError, match="not signed by the policy key"):
        KEYS.open_untrusted(signed)


def test_nothing_is_read_before_the_signature() -> None:
    with pytest.raises(RemoteProtocolError, match="not signed"):
        KEYS.open_untrusted(SignedDocument(b"{", bytes(64)))
    with pytest.raises(RemoteProtocolError, match="not JSON"):
        KEYS.open_untrusted(sign_policy(KEY, b"{"))


def test_two_keys_while_they_change(tmp_path: Path) -> None:
    file = tmp_path / "policy.pub"
    file.write_bytes(public_key_pem(OTHER.public_key()) + public_key_pem(KEY.public_key()))
    keys = read_policy_keys(file)
    for key in (KEY, OTHER):
        assert keys.open_untrusted(sign_policy(key, document())).serial == 7


def test_files_that_are_no_keys(tmp_path: Path) -> None:
    file = tmp_path / "file"
    p256 = ec.generate_private_key(ec.SECP256R1())
    file.write_bytes(b"hello")
    with pytest.raises(IdentityError, match="holds no public key in PEM"):
        read_policy_keys(file)
    file.write_bytes(b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    with pytest.raises(IdentityError, match="holds a malformed public key"):
        read_policy_keys(file)
    file.write_bytes(
        p256.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    with pytest.raises(IdentityError, match="must be Ed25519"):
        read_policy_keys(file)
    file.write_bytes(private_key_pem(p256))
    file.chmod(0o600)
    with pytest.raises(IdentityError, match="must be Ed25519"):
        read_policy_key(file)
    with pytest.raises(IdentityError, match=r"cannot read .*none"):
        read_policy_keys(tmp_path / "none")


def test_signed_file(tmp_path: Path) -> None:
    file = tmp_path / "policy.signed"
    signed = sign_policy(KEY, document())
    file.write_bytes(signed.to_bytes())
    assert read_signed_policy(file) == signed
    file.write_bytes(document())
    with pytest.raises(IdentityError, match="is no signed policy"):
        read_signed_policy(file)
