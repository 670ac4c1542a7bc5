"""The MTU of a path: which sizes are asked, what an answer proves, when it is over."""

import random

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztna.core.mtuprobe import (
    INTERVAL,
    IPV4_OVERHEAD,
    IPV6_OVERHEAD,
    MAX_ROUNDS,
    MTUS,
    MtuProber,
    PathMtu,
)
from ztna.core.ports import Address
from ztna.core.stun.attributes import Error, ErrorCode
from ztna.core.stun.messages import (
    MessageClass,
    StunMessage,
    build_stun_message,
    parse_stun_untrusted,
)
from ztna.core.stun_server import LocalEnd, StunServer

V4, V6 = ("198.51.100.10", 4433), ("2001:db8::10", 4433)
ME = {4: ("192.0.2.7", 5000), 6: ("2001:db8::7", 5000)}


@attrs.define
class Path:
    """A path to our server, with an MTU in each direction."""

    server: Address = V4
    forth: int = 1500
    back: int = 1500
    lost_rounds: int = 0
    pads: bool = True
    prober: MtuProber = attrs.field(init=False)
    sent: list[int] = attrs.field(factory=list)
    now: float = 10.0

    def __attrs_post_init__(self) -> None:
        self.prober = MtuProber(self.server, random.Random(1))

    def run(self) -> PathMtu:
        prober, server = self.prober, StunServer(self.server)
        six = ":" in self.server[0]
        overhead = IPV6_OVERHEAD if six else IPV4_OVERHEAD
        prober.start(self.now)
        rounds = 0
        while (timer := prober.get_timer()) is not None:
            requests = prober.requests_to_send(self.now)
            self.sent.append(len(requests))
            rounds += 1
            for data in requests:
                if len(data) + overhead > self.forth or rounds <= self.lost_rounds:
                    continue
                answer = self._answer(server, data, ME[6 if six else 4])
                if len(answer) + overhead <= self.back:
                    prober.receive_response_untrusted(answer, self.server)
            self.now = timer
            prober.handle_timer(self.now)
        return prober.result

    def _answer(self, server: StunServer, data: bytes, source: Address) -> bytes:
        if self.pads:
            reply = server.receive_untrusted(data, source, LocalEnd(), self.now)
            assert reply is not None
            return reply.data
        request = parse_stun_untrusted(data)
        error = ErrorCode(Error.UNKNOWN_ATTRIBUTE, "no PADDING")
        return build_stun_message(StunMessage(MessageClass.ERROR, request.transaction_id, (error,)))


@pytest.mark.parametrize("server", [V4, V6])
@pytest.mark.parametrize("mtu", MTUS)
def test_every_mtu_exactly(server: Address, mtu: int) -> None:
    path = Path(server, mtu, 1500)
    assert path.run() == PathMtu(mtu, mtu)
    above = MTUS.index(mtu)
    assert path.sent == ([len(MTUS)] if above == 0 else [len(MTUS), above, above])


def test_the_narrower_direction_counts() -> None:
    assert Path(forth=1500, back=1400).run() == PathMtu(1400, 1400)


def test_between_two_sizes_the_lower_one_counts() -> None:
    assert Path(forth=1459).run() == PathMtu(1448, 1448)


def test_too_small_for_all() -> None:
    path = Path(forth=1000)
    assert path.run() == PathMtu(None, None)
    assert path.sent == [len(MTUS)] * MAX_ROUNDS
    assert path.now == 10.0 + MAX_ROUNDS * INTERVAL


def test_loss_is_made_good() -> None:
    path = Path(lost_rounds=2)
    assert path.run() == PathMtu(1500, 1500)
    assert path.sent == [len(MTUS)] * 3


def test_a_server_without_padding_proves_one_direction() -> None:
    assert Path(forth=1420, pads=False).run() == PathMtu(1420, None)


def test_what_proves_nothing() -> None:
    prober = MtuProber(V4, random.Random(1))
    assert prober.get_timer() is None
    prober.handle_timer(5)
    prober.start(10)
    (largest, *_), request_class = prober.requests_to_send(10), MessageClass.REQUEST
    known = parse_stun_untrusted(largest).transaction_id
    for transaction_id, kind, source in (
        (b"?" * 12, MessageClass.SUCCESS, V4),
        (known, MessageClass.SUCCESS, (V4[0], 1)),
        (known, request_class, V4),
        (known, MessageClass.INDICATION, V4),
    ):
        data = build_stun_message(StunMessage(kind, transaction_id, ()))
        prober.receive_response_untrusted(data, source)
    prober.handle_timer(10.1)  # too early
    assert prober.requests_to_send(10.1) == []
    assert (prober.result, prober.get_timer()) == (PathMtu(None, None), 10 + INTERVAL)


@given(st.binary(max_size=100))
def test_any_bytes(data: bytes) -> None:
    prober = MtuProber(V4, random.Random(1))
    prober.start(0)
    prober.receive_response_untrusted(data, V4)
    assert prober.result == PathMtu(None, None)
