"""Whose a STUN message is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.ice.owner import stun_owner_untrusted
from ztna.core.stun.attributes import Username
from ztna.core.stun.messages import MessageClass, StunMessage, build_stun_message

NUMBER = b"abcdefghijkl"


def built(kind: MessageClass, *attributes: Username) -> bytes:
    return build_stun_message(StunMessage(kind, NUMBER, attributes))


@pytest.mark.parametrize(
    ("data", "owner"),
    [
        (built(MessageClass.REQUEST, Username("ours:theirs")), "ours"),
        (built(MessageClass.REQUEST, Username("ours")), "ours"),
        (built(MessageClass.REQUEST), None),
        (built(MessageClass.INDICATION, Username("ours:theirs")), None),
        (built(MessageClass.SUCCESS), NUMBER),
        (built(MessageClass.ERROR, Username("ours:theirs")), NUMBER),
        (b"\0\1", None),
    ],
)
def test_owner(data: bytes, owner: object) -> None:
    assert stun_owner_untrusted(data) == owner


@given(st.binary(max_size=60))
def test_garbage(data: bytes) -> None:
    assert stun_owner_untrusted(data) is None or len(data) >= 20
