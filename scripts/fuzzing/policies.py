"""The signed policy for the fuzzer: good documents, and what is done with mutated ones."""

import json

from cryptography.hazmat.primitives.asymmetric import ed25519

from scripts.fuzzing.tables import Parser
from ztna.core.identity import Identity, Role
from ztna.core.policy_document import SIGNATURE_SIZE, SignedDocument, parse_policy_untrusted
from ztna.errors import RemoteProtocolError
from ztna.policy_key import PolicyKeys, sign_policy
from ztna.roles.signed_policy import SignedPolicy

DOCUMENT = {
    "version": 1,
    "trust_domain": "example.net",
    "serial": 1,
    "issued": "2026-01-01T00:00:00Z",
    "expires": "2999-01-01T00:00:00Z",
    "groups": {"staff": ["agent/laptop", "connector/home"]},
    "services": [
        {"id": "web", "virtual_ip": "10.100.0.2", "protocol": "tcp", "port": [80, 443]},
        {"id": "any", "virtual_ip": "10.100.0.3"},
    ],
    "rules": [
        {"who": "group:staff", "services": ["web"], "provides": ["*"]},
        {"who": "agent/*", "services": ["any"]},
    ],
}
DOCUMENTS = [
    json.dumps(DOCUMENT).encode(),
    json.dumps({**DOCUMENT, "serial": 2, "groups": {}, "rules": []}, indent=1).encode(),
]
FILES = [SignedDocument(document, bytes(SIGNATURE_SIZE)).to_bytes() for document in DOCUMENTS]


def parse_policy(data: bytes) -> None:
    """Whatever is a document decides whatever it is asked."""
    policy = parse_policy_untrusted(data)
    laptop = Identity(policy.trust_domain, Role.AGENT, "laptop")
    for service_id in policy.services:
        assert policy.may_reach(laptop, service_id).reason


def make_signed_policy() -> Parser:
    """As a node gets it: a document is taken only if the key has signed it."""
    key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))
    policy = SignedPolicy("example.net", PolicyKeys((key.public_key(),)))

    def parse(data: bytes) -> None:
        before = policy.document
        try:
            policy.take_untrusted(SignedDocument.parse_untrusted(data))
        except RemoteProtocolError:
            assert policy.document is before
            # The same with a good signature, so that what lies behind it is tried, too.
            policy.take_untrusted(sign_policy(key, data))
        else:
            raise AssertionError("taken without a signature")

    return parse
