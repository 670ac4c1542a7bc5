"""The STUN server's answers: RFC 5780's table, refusals, old clients, limits, no amplification."""

from collections.abc import Callable

import aioice.stun
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.test_stun import EVERY_ATTRIBUTE, ID, KEY, OLD_ID, raw
from ztna.core.limits import SourceLimiter
from ztna.core.ports import Address
from ztna.core.stun import attributes as a
from ztna.core.stun.messages import (
    MessageClass,
    StunMessage,
    build_stun_message,
    parse_stun_untrusted,
)
from ztna.core.stun.values import AnyAttribute
from ztna.core.stun_server import (
    MAX_GROWTH,
    MAX_PADDED,
    LocalEnd,
    StunReply,
    StunServer,
)
from ztna.errors import LocalProtocolError

CLIENT: Address = ("203.0.113.9", 40_000)
CLIENT6: Address = ("2001:db8::9", 40_000)
PRIMARY = LocalEnd()
ENDS = [LocalEnd(ip, port) for ip in (False, True) for port in (False, True)]
ADDRESSES: dict[LocalEnd, Address] = {
    LocalEnd(False, False): ("198.51.100.1", 3478),
    LocalEnd(False, True): ("198.51.100.1", 3479),
    LocalEnd(True, False): ("198.51.100.2", 3478),
    LocalEnd(True, True): ("198.51.100.2", 3479),
}


def full_server() -> StunServer:
    return StunServer(("198.51.100.1", 3478), "198.51.100.2", 3479)


def single_server() -> StunServer:
    return StunServer(("198.51.100.1", 3478))


def request(*attributes: AnyAttribute, transaction_id: bytes = ID) -> bytes:
    return build_stun_message(
        StunMessage(MessageClass.REQUEST, transaction_id, attributes), fingerprint=False
    )


def ask(
    server: StunServer, data: bytes, end: LocalEnd = PRIMARY, client: Address = CLIENT
) -> tuple[StunReply, StunMessage]:
    """The reply to a request that is answered, and what it says."""
    reply = server.receive_untrusted(data, client, end, 0.0)
    assert reply is not None
    answer = parse_stun_untrusted(reply.data)
    assert answer.transaction_id == parse_stun_untrusted(data).transaction_id
    assert len(reply.data) <= len(data) + MAX_GROWTH
    return reply, answer


def error_of(server: StunServer, data: bytes, end: LocalEnd = PRIMARY) -> StunMessage:
    reply, answer = ask(server, data, end)
    assert (reply.end, reply.destination) == (end, CLIENT)
    assert answer.message_class is MessageClass.ERROR
    return answer


def test_ends() -> None:
    assert full_server().ends() == ADDRESSES
    assert single_server().ends() == {PRIMARY: ("198.51.100.1", 3478)}
    two_ports = StunServer(("198.51.100.1", 3478), alternate_port=3479)
    assert list(two_ports.ends()) == [PRIMARY, LocalEnd(alternate_port=True)]


def test_plain_binding() -> None:
    reply, answer = ask(single_server(), request())
    assert reply.end == PRIMARY
    assert reply.destination == CLIENT
    assert answer == StunMessage(
        MessageClass.SUCCESS,
        ID,
        (
            a.XorMappedAddress(CLIENT),
            a.MappedAddress(CLIENT),
            a.ResponseOrigin(("198.51.100.1", 3478)),
        ),
    )


@pytest.mark.parametrize("end", ENDS, ids=repr)
@pytest.mark.parametrize("change_ip", [False, True])
@pytest.mark.parametrize("change_port", [False, True])
def test_table_of_rfc_5780(end: LocalEnd, change_ip: bool, change_port: bool) -> None:
    """Section 6.1, table 1: from whichever end the request came to."""
    reply, answer = ask(
        full_server(), request(a.ChangeRequest(change_ip=change_ip, change_port=change_port)), end
    )
    leaves = LocalEnd(end.alternate_ip ^ change_ip, end.alternate_port ^ change_port)
    opposite = LocalEnd(not end.alternate_ip, not end.alternate_port)
    assert (reply.end, reply.destination) == (leaves, CLIENT)
    assert answer.find(a.ResponseOrigin) == a.ResponseOrigin(ADDRESSES[leaves])
    assert answer.find(a.OtherAddress) == a.OtherAddress(ADDRESSES[opposite])
    assert answer.find(a.XorMappedAddress) == a.XorMappedAddress(CLIENT)


@pytest.mark.parametrize("change", [(True, False), (True, True), (False, True)])
def test_single_address_knows_no_change(change: tuple[bool, bool]) -> None:
    answer = error_of(single_server(), request(a.ChangeRequest(*change)))
    assert answer.attributes == (
        a.ErrorCode(420, "Unknown Attribute"),
        a.UnknownAttributes((a.ChangeRequest.kind,)),
    )


def test_request_to_change_nothing_is_always_answered() -> None:
    reply, answer = ask(single_server(), request(a.ChangeRequest(False, False)))
    assert reply.end == PRIMARY
    assert answer.find(a.OtherAddress) is None


def test_two_ports_at_one_address() -> None:
    """'Change port' works; OTHER-ADDRESS would promise an address that is not there."""
    server = StunServer(("198.51.100.1", 3478), alternate_port=3479)
    reply, answer = ask(server, request(a.ChangeRequest(change_ip=False, change_port=True)))
    assert reply.end == LocalEnd(alternate_port=True)
    assert answer.find(a.ResponseOrigin) == a.ResponseOrigin(("198.51.100.1", 3479))
    assert answer.find(a.OtherAddress) is None
    refused = error_of(server, request(a.ChangeRequest(change_ip=True, change_port=True)))
    assert refused.find(a.UnknownAttributes) == a.UnknownAttributes((3,))


def test_unknown_attributes_are_named() -> None:
    data = raw((0x7777, b""), (0x8888, b""), (0x0002, bytes(8)), (0x0003, bytes([0, 0, 0, 6])))
    assert error_of(full_server(), data).find(a.UnknownAttributes) == (
        a.UnknownAttributes((0x7777, 0x0002))
    )
    assert error_of(single_server(), data).find(a.UnknownAttributes) == (
        a.UnknownAttributes((0x7777, 0x0002, 0x0003))
    )


def test_response_port() -> None:
    reply, answer = ask(full_server(), request(a.ResponsePort(50_000)))
    assert reply.destination == (CLIENT[0], 50_000)
    assert answer.find(a.XorMappedAddress) == a.XorMappedAddress(CLIENT)
    both = request(a.ResponsePort(50_000), a.ChangeRequest(True, True))
    reply, _ = ask(full_server(), both)
    assert (reply.end, reply.destination) == (LocalEnd(True, True), (CLIENT[0], 50_000))


@pytest.mark.parametrize(
    "attributes", [(a.ResponsePort(0),), (a.ResponsePort(5), a.Padding(100))], ids=repr
)
def test_bad_response_port(attributes: tuple[AnyAttribute, ...]) -> None:
    assert error_of(full_server(), request(*attributes)).attributes == (
        a.ErrorCode(400, "Bad Request"),
    )


@pytest.mark.parametrize("size", [0, 4, 40, 80, 84, 100, 1400, 2020, 3000, 60_000])
@pytest.mark.parametrize("make", [single_server, full_server])
def test_padding_is_given_back_and_no_more(size: int, make: Callable[[], StunServer]) -> None:
    server, data = make(), request(a.Padding(size))
    reply, answer = ask(server, data)
    plain = len(ask(server, request())[0].data)
    assert len(reply.data) == max(plain, min(len(data), MAX_PADDED)) or len(reply.data) == plain
    assert (answer.find(a.Padding) is not None) is (len(data) > plain + 4)
    assert len(reply.data) <= max(plain, len(data))


def test_fingerprint_answers_a_fingerprint() -> None:
    bare = StunMessage(MessageClass.REQUEST, ID)
    _, answer = ask(full_server(), build_stun_message(bare))
    assert type(answer.attributes[-1]) is a.Fingerprint
    padded = StunMessage(MessageClass.REQUEST, ID, (a.Padding(1000),))
    data = build_stun_message(padded)
    reply, answer = ask(full_server(), data)
    assert type(answer.attributes[-1]) is a.Fingerprint
    assert len(reply.data) == len(data)


@pytest.mark.parametrize(
    "data",
    [
        request(a.Username("them:us")),
        build_stun_message(StunMessage(MessageClass.REQUEST, ID), KEY, fingerprint=False),
    ],
    ids=["user name", "signature"],
)
def test_ice_checks_are_told_that_this_is_nobodys_peer(data: bytes) -> None:
    assert error_of(full_server(), data).attributes == (a.ErrorCode(401, "Unauthenticated"),)


def test_old_client() -> None:
    """RFC 3489: no cookie, CHANGED-ADDRESS, and no XOR."""
    data = request(a.ChangeRequest(True, True), transaction_id=OLD_ID)
    reply, answer = ask(full_server(), data)
    assert reply.end == LocalEnd(True, True)
    assert answer.attributes == (
        a.MappedAddress(CLIENT),
        a.SourceAddress(("198.51.100.2", 3479)),
        a.ChangedAddress(("198.51.100.2", 3479)),
    )
    _, answer = ask(single_server(), request(transaction_id=OLD_ID))
    assert answer.find(a.ChangedAddress) is None


@pytest.mark.parametrize(
    ("kinds", "named"), [((0x7777,), (0x7777, 0x7777)), ((0x7777, 0x7778), (0x7777, 0x7778))]
)
def test_old_client_gets_unknown_types_in_pairs(
    kinds: tuple[int, ...], named: tuple[int, ...]
) -> None:
    """RFC 3489 section 11.2.10."""
    data = raw(*[(kind, b"") for kind in kinds], transaction_id=OLD_ID)
    assert error_of(full_server(), data).find(a.UnknownAttributes) == a.UnknownAttributes(named)


def test_ipv6() -> None:
    server = StunServer(("2001:db8::1", 3478), "2001:db8::2", 3479)
    data = request()
    reply, answer = ask(server, data, client=CLIENT6)
    assert answer.find(a.XorMappedAddress) == a.XorMappedAddress(CLIENT6)
    assert answer.find(a.OtherAddress) == a.OtherAddress(("2001:db8::2", 3479))
    assert len(reply.data) == len(data) + MAX_GROWTH


def test_client_of_the_other_ip_version() -> None:
    """On a port that carries both: the other address would be of no use to it."""
    reply, answer = ask(full_server(), request(), client=CLIENT6)
    assert (reply.end, reply.destination) == (PRIMARY, CLIENT6)
    assert answer.find(a.XorMappedAddress) == a.XorMappedAddress(CLIENT6)
    assert answer.find(a.OtherAddress) is None
    change = request(a.ChangeRequest(change_ip=False, change_port=True))
    assert ask(full_server(), change, client=CLIENT6)[0].end == LocalEnd(alternate_port=True)
    for change_port in (False, True):
        data = request(a.ChangeRequest(change_ip=True, change_port=change_port))
        assert ask(full_server(), data, client=CLIENT6)[1].message_class is MessageClass.ERROR


def test_aioice_reads_the_answer() -> None:
    reply, _ = ask(full_server(), request())
    theirs = aioice.stun.parse_message(reply.data)
    assert theirs.attributes == {
        "XOR-MAPPED-ADDRESS": CLIENT,
        "MAPPED-ADDRESS": CLIENT,
        "RESPONSE-ORIGIN": ("198.51.100.1", 3478),
        "OTHER-ADDRESS": ("198.51.100.2", 3479),
    }


@pytest.mark.parametrize(
    ("data", "client", "why"),
    [
        (b"", CLIENT, "malformed"),
        (request()[:-1], CLIENT, "malformed"),
        (request(), (CLIENT[0], 0), "no_source_port"),
        *(
            (
                build_stun_message(StunMessage(message_class, ID)),
                CLIENT,
                "not_a_binding_request",
            )
            for message_class in MessageClass
            if message_class is not MessageClass.REQUEST
        ),
        (
            build_stun_message(StunMessage(MessageClass.REQUEST, ID, method=3)),
            CLIENT,
            "not_a_binding_request",
        ),
    ],
)
def test_silence_is_counted(data: bytes, client: Address, why: str) -> None:
    server = full_server()
    assert server.receive_untrusted(data, client, PRIMARY, 0.0) is None
    assert server.statistics() == {why: 1}


def test_answers_are_counted() -> None:
    server = single_server()
    ask(server, request())
    ask(server, request())
    ask(server, request(a.ChangeRequest(True, True)))
    assert server.statistics() == {"answered": 2, "error_420": 1}


def test_an_end_that_is_not_served() -> None:
    with pytest.raises(LocalProtocolError, match="alternate_ip=True"):
        single_server().receive_untrusted(request(), CLIENT, LocalEnd(True, False), 0.0)


def test_each_source_has_its_own_limit() -> None:
    server = single_server()
    server.limiter = SourceLimiter(rate=1.0, burst=2.0)

    def answered(client: Address, now: float) -> bool:
        return server.receive_untrusted(request(), client, PRIMARY, now) is not None

    # Ports do not matter, nor what an IPv6 host puts behind its /64.
    assert [answered((CLIENT[0], 1000 + n), 5.0) for n in range(3)] == [True, True, False]
    assert answered(("203.0.113.10", 1), 5.0)
    assert [answered((f"2001:db8::{n}", 1), 5.0) for n in (1, 2, 3)] == [True, True, False]
    assert answered(("2001:db8:0:1::1", 1), 5.0)
    assert answered(CLIENT, 6.0)
    assert server.statistics() == {"answered": 7, "limited": 2}


PIECES = st.lists(
    st.tuples(st.sampled_from([1, 2, 3, 6, 8, 0x1C, 0x26, 0x27, 0x7777, 0x8028]), st.binary()),
    max_size=5,
)
BUILT = st.lists(st.sampled_from(EVERY_ATTRIBUTE), max_size=5).map(lambda x: request(*x))


@given(
    st.binary(max_size=100) | PIECES.map(lambda pieces: raw(*pieces)) | BUILT,
    st.sampled_from(ENDS),
    st.sampled_from([CLIENT, CLIENT6]),
)
def test_nothing_that_comes_in_makes_more_go_out(
    data: bytes, end: LocalEnd, client: Address
) -> None:
    reply = full_server().receive_untrusted(data, client, end, 0.0)
    if reply is not None:
        assert len(reply.data) <= len(data) + MAX_GROWTH
        assert reply.destination[0] == client[0]
        assert reply.end in ADDRESSES
        parse_stun_untrusted(reply.data)
