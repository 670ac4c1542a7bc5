"""SPIFFE IDs: ours are read, everything else is refused with one error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.identity import Identity, Role, valid_name, valid_trust_domain
from ztna.errors import RemoteProtocolError


@pytest.mark.parametrize("role", list(Role))
def test_round_trip(role: Role) -> None:
    uri = f"spiffe://example.net/{role.value}/home-1.a_B"
    identity = Identity.parse_untrusted(uri)
    assert identity == Identity("example.net", role, "home-1.a_B")
    assert identity.uri == uri
    assert str(identity) == f"{role.value}/home-1.a_B"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("https://example.net/agent/a", "not a SPIFFE ID"),
        ("spiffe:example.net/agent/a", "not a SPIFFE ID"),
        ("spiffe", "not a SPIFFE ID"),
        ("SPIFFE://example.net/agent/a", "not a SPIFFE ID"),
        ("spiffe:///agent/a", "malformed trust domain"),
        ("spiffe://Example.net/agent/a", "malformed trust domain"),
        ("spiffe://example.net:1/agent/a", "malformed trust domain"),
        (f"spiffe://{'a' * 256}/agent/a", "malformed trust domain"),
        ("spiffe://example.net", "must end in"),
        ("spiffe://example.net/agent", "must end in"),
        ("spiffe://example.net/agent/a/b", "must end in"),
        ("spiffe://example.net/agent/a/", "must end in"),
        ("spiffe://example.net/admin/a", "must end in"),
        ("spiffe://example.net/AGENT/a", "must end in"),
        ("spiffe://example.net/agent/", "must end in"),
        ("spiffe://example.net/agent/..", "must end in"),
        ("spiffe://example.net/agent/.", "must end in"),
        ("spiffe://example.net/agent/a\n", "must end in"),
        ("spiffe://example.net/agent/a?x", "must end in"),
        (f"spiffe://example.net/agent/{'a' * 64}", "must end in"),
    ],
)
def test_refused(uri: str, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        Identity.parse_untrusted(uri)


def test_longest_name_and_domain() -> None:
    assert valid_name("a" * 63)
    assert not valid_name("a" * 64)
    assert not valid_name("..")
    assert not valid_name("")
    assert valid_trust_domain("a" * 255)
    assert not valid_trust_domain("a" * 256)
    assert not valid_trust_domain("a\n")


@given(st.text() | st.text().map(lambda text: "spiffe://example.net/agent/" + text))
def test_garbage(uri: str) -> None:
    try:
        identity = Identity.parse_untrusted(uri)
    except RemoteProtocolError:
        return
    assert identity.uri == uri
