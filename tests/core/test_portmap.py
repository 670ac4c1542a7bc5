"""A port mapper and a gateway back to back, in virtual time."""

import itertools
import random
from collections.abc import Callable

import attrs
import pytest

from ztna.core import portmap_messages as wire
from ztna.core.portmap import (
    LIFETIME,
    LONGEST_REST,
    LOOK_INTERVAL,
    REST,
    SHORTEST_REST,
    MappingProtocol,
    PortMapper,
    unusable,
)
from ztna.core.portmap_epoch import Epoch
from ztna.core.ports import Address
from ztna.errors import RemoteProtocolError

HOST, ROUTER, OUTER = "10.1.0.2", "10.1.0.1", "203.0.113.7"
SERVER = (ROUTER, wire.SERVER_PORT)
PORT = 4433
PMP = (MappingProtocol.NAT_PMP,)


def mapped(host: str) -> bytes:
    return bytes(10) + b"\xff\xff" + bytes(map(int, host.split(".")))


@attrs.define
class Router:
    """As small a gateway as can be: what it speaks, and what it answers."""

    pcp: bool = True
    natpmp: bool = True
    drops_pcp: bool = False
    outer: str = OUTER
    result: int = 0
    lifetime: int | None = None
    booted: float = 0.0
    heard: list[bytes] = attrs.Factory(list)
    mappings: dict[int, int] = attrs.Factory(dict)

    def answer(self, data: bytes, now: float) -> bytes | None:
        self.heard.append(data)
        if data[0] == wire.PCP_VERSION and self.drops_pcp:
            return None
        epoch = int(now - self.booted).to_bytes(4)
        if data[0] == wire.PCP_VERSION and not self.pcp:
            return b"\0" + bytes((0x80 | data[1],)) + b"\0\1" + epoch if self.natpmp else None
        if data[0] == wire.PCP_VERSION:
            lifetime = int.from_bytes(data[4:8])
            if self.lifetime is not None:
                lifetime = self.lifetime
            head = bytes((2, 0x80 | data[1], 0, self.result)) + lifetime.to_bytes(4) + epoch
            if data[1] == wire.OP_ANNOUNCE:
                return head + bytes(12)
            port = self.give(data[40:42], data[42:44], lifetime)
            return head + bytes(12) + data[24:42] + port + mapped(self.outer)
        if not self.natpmp:
            return None
        head = bytes((0, 0x80 | data[1])) + self.result.to_bytes(2) + epoch
        if data[1] == wire.OP_ADDRESS:
            return head + mapped(self.outer)[12:]
        lifetime = int.from_bytes(data[8:12]) if self.lifetime is None else self.lifetime
        return head + data[4:6] + self.give(data[4:6], data[6:8], lifetime) + lifetime.to_bytes(4)

    def give(self, inner: bytes, suggested: bytes, lifetime: int) -> bytes:
        number = int.from_bytes(inner)
        self.mappings.pop(number, None)
        if lifetime and not self.result:
            self.mappings[number] = int.from_bytes(suggested) or 40_000
        return self.mappings.get(number, 0).to_bytes(2)

    def reboot(self, now: float) -> None:
        self.booted = now
        self.mappings.clear()


def started(protocols: tuple[MappingProtocol, ...] = tuple(MappingProtocol)) -> PortMapper:
    mapper = PortMapper(HOST, ROUTER, PORT, random.Random(1), protocols)
    mapper.start(0.0)
    return mapper


def external(mapper: PortMapper) -> Address | None:
    return mapper.external


def ended(mapper: PortMapper) -> bool:
    return mapper.done


def spoken(mapper: PortMapper) -> MappingProtocol:
    return mapper.protocol


def talk(mapper: PortMapper, router: Router, now: float) -> None:
    while data := mapper.datagrams_to_send(now):
        for request in data:
            answer = router.answer(request, now)
            if answer is not None:
                mapper.receive_untrusted(answer, SERVER, now)


def run(mapper: PortMapper, router: Router, now: float, until: float) -> list[tuple[float, bytes]]:
    """Let time pass; what was sent, and when."""
    sent = []
    while True:
        before = len(router.heard)
        talk(mapper, router, now)
        sent += [(now, data) for data in router.heard[before:]]
        timer = mapper.get_timer()
        if timer is None or timer > until:
            return sent
        now = max(now, timer)
        mapper.handle_timer(now)


@pytest.mark.parametrize("protocol", list(MappingProtocol))
def test_maps_looks_renews_and_deletes(protocol: MappingProtocol) -> None:
    mapper, router = started((protocol,)), Router()
    run(mapper, router, 0.0, 0.0)
    assert (external(mapper), mapper.problem) == ((OUTER, PORT), "")
    assert router.mappings == {PORT: PORT}
    first = len(router.heard)
    sent = run(mapper, router, 0.0, LIFETIME / 2 - 1)
    looks = range(int(LOOK_INTERVAL), LIFETIME // 2, int(LOOK_INTERVAL))
    assert [at for at, _ in sent] == list(looks)
    assert {len(data) for _, data in sent} == {24 if protocol is MappingProtocol.PCP else 2}
    sent = run(mapper, router, LIFETIME / 2 - 1, LIFETIME * 5 / 8)
    renewals = [at for at, data in sent if len(data) == len(router.heard[first - 1])]
    assert len(renewals) == 1
    assert LIFETIME / 2 <= renewals[0] <= LIFETIME * 5 / 8
    assert external(mapper) == (OUTER, PORT)
    mapper.stop(500.0)
    run(mapper, router, 500.0, 501.0)
    assert (ended(mapper), external(mapper), router.mappings) == (True, None, {})
    assert mapper.get_timer() is None
    # Whatever comes later changes nothing.
    mapper.receive_untrusted(b"\0\x80\0\0\0\0\0\0\1\2\3\4", SERVER, 502.0)
    mapper.handle_timer(503.0)
    assert mapper.datagrams_to_send(503.0) == []


def test_natpmp_where_pcp_is_not_known() -> None:
    mapper, router = started(), Router(pcp=False)
    run(mapper, router, 0.0, 0.0)
    assert (spoken(mapper), external(mapper)) == (MappingProtocol.NAT_PMP, (OUTER, PORT))
    assert [len(data) for data in router.heard] == [60, 2, 12]


def test_natpmp_where_pcp_is_dropped() -> None:
    mapper, router = started(), Router(drops_pcp=True)
    run(mapper, router, 0.0, 30.0)
    assert spoken(mapper) is MappingProtocol.NAT_PMP
    assert external(mapper) == (OUTER, PORT)


def test_silence_in_both_and_a_rest() -> None:
    mapper, router = started(), Router(pcp=False, natpmp=False)
    sent = run(mapper, router, 0.0, 300.0)
    assert [len(data) for _, data in sent] == [60] * 3 + [2] * 9
    times = [at for at, _ in sent]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    for gap, nominal in zip(gaps[:3], (3, 6, 12), strict=True):
        assert nominal * 0.9 <= gap <= nominal * 1.1
    assert gaps[3:] == pytest.approx([0.25 * 2**i for i in range(8)])
    assert mapper.problem == "the gateway 10.1.0.1 maps no port: it does not answer"
    assert external(mapper) is None
    again = run(mapper, router, 300.0, times[-1] + 64 + REST)
    assert [len(data) for _, data in again] == [60]


@pytest.mark.parametrize("protocol", list(MappingProtocol))
def test_gateway_that_restarted(protocol: MappingProtocol) -> None:
    mapper, router = started((protocol,)), Router(booted=-5000)
    run(mapper, router, 0.0, 130.0)
    assert mapper.restarts == 0
    router.reboot(130.0)
    assert router.mappings == {}
    run(mapper, router, 130.0, 181.0)
    assert mapper.restarts == 1
    assert (external(mapper), router.mappings) == ((OUTER, PORT), {PORT: PORT})


def test_natpmp_address_that_changed() -> None:
    mapper, router = started(PMP), Router()
    run(mapper, router, 0.0, 1.0)
    router.outer = "203.0.113.8"
    run(mapper, router, 1.0, 61.0)
    assert (external(mapper), mapper.restarts) == (("203.0.113.8", PORT), 0)


def test_gateway_that_does_not_know_announce_is_not_looked_at() -> None:
    mapper, router = started(), Router()
    run(mapper, router, 0.0, 1.0)
    router.result = 4
    assert len(run(mapper, router, 1.0, 61.0)) == 1
    router.result = 0
    assert run(mapper, router, 61.0, LIFETIME / 2 - 1) == []
    run(mapper, router, LIFETIME / 2 - 1, 2000.0)
    assert external(mapper) == (OUTER, PORT)


def test_a_mapping_ends_when_nobody_renews_it() -> None:
    mapper, router = started(), Router()
    run(mapper, router, 0.0, 1.0)
    silent = Router(pcp=False, natpmp=False)
    sent = run(mapper, silent, 1.0, LIFETIME - 0.1)
    assert external(mapper) == (OUTER, PORT)
    assert any(len(data) == 60 for _, data in sent)
    run(mapper, silent, LIFETIME - 0.1, LIFETIME)
    assert external(mapper) is None
    assert "has not renewed" in mapper.problem
    run(mapper, router, LIFETIME, LIFETIME + 2 * REST)
    assert external(mapper) == (OUTER, PORT)


@pytest.mark.parametrize(
    ("protocol", "result", "lifetime", "rest", "words"),
    [
        (MappingProtocol.PCP, 2, 1800, LONGEST_REST, "it does not allow it"),
        (MappingProtocol.PCP, 8, 1, SHORTEST_REST, "it has no port left"),
        (MappingProtocol.PCP, 12, 1 << 31, LONGEST_REST, "another NAT is between us and it"),
        (MappingProtocol.PCP, 99, 60, 60, "error 99"),
        (MappingProtocol.NAT_PMP, 2, None, LONGEST_REST, "it does not allow it"),
        (MappingProtocol.NAT_PMP, 3, None, SHORTEST_REST, "it has no outer address itself"),
        (MappingProtocol.NAT_PMP, 77, None, SHORTEST_REST, "error 77"),
    ],
)
def test_errors(
    protocol: MappingProtocol, result: int, lifetime: int | None, rest: float, words: str
) -> None:
    mapper, router = started((protocol,)), Router(result=result, lifetime=lifetime)
    run(mapper, router, 0.0, 1.0)
    assert external(mapper) is None
    assert mapper.problem == f"the gateway 10.1.0.1 maps no port: {words}"
    assert mapper.get_timer() == rest
    router.result, router.lifetime = 0, None
    mapper.handle_timer(rest)
    talk(mapper, router, rest)
    assert (external(mapper), mapper.problem) == ((OUTER, PORT), "")


def test_natpmp_error_of_the_mapping_itself() -> None:
    mapper = started(PMP)
    mapper.datagrams_to_send(0.0)
    mapper.receive_untrusted(b"\0\x80\0\0\0\0\0\0\1\2\3\4", SERVER, 0.1)
    # An error of a request that was answered before changes nothing.
    mapper.receive_untrusted(b"\0\x80\0\3\0\0\0\0", SERVER, 0.1)
    assert mapper.problem == ""
    mapper.receive_untrusted(b"\0\x81\0\4\0\0\0\0", SERVER, 0.2)
    assert mapper.problem.endswith("it has no port left")


def test_an_error_at_renewal_leaves_the_mapping_until_its_end() -> None:
    mapper, router = started(), Router()
    run(mapper, router, 0.0, 1.0)
    router.result, router.lifetime = 8, 30
    run(mapper, router, 1.0, LIFETIME - 1)
    assert external(mapper) == (OUTER, PORT)
    run(mapper, router, LIFETIME - 1, LIFETIME + 40)
    assert external(mapper) is None


@pytest.mark.parametrize("protocol", list(MappingProtocol))
def test_nobody_listens(protocol: MappingProtocol) -> None:
    mapper, router = started((protocol,)), Router()
    mapper.datagrams_to_send(0.0)
    mapper.refused(0.1)
    assert mapper.problem.endswith("it does not offer port mappings")
    assert mapper.get_timer() == 0.1 + REST
    mapper.refused(0.2)  # of an older packet
    assert mapper.get_timer() == 0.1 + REST
    mapper.handle_timer(0.1 + REST)
    talk(mapper, router, 700.0)
    mapper.refused(701.0)  # its server starts anew: the mapping is not given up
    assert external(mapper) == (OUTER, PORT)
    mapper.stop(702.0)
    mapper.refused(702.0)
    assert ended(mapper)


@pytest.mark.parametrize(
    ("outer", "words"),
    [
        ("192.168.1.5", "another NAT is above it"),
        ("100.64.0.9", "another NAT is above it"),
        ("0.0.0.0", "of no use (unspecified address)"),
        ("127.0.0.1", "of no use (loopback address)"),
    ],
)
@pytest.mark.parametrize("protocol", list(MappingProtocol))
def test_outer_addresses_that_are_of_no_use(
    protocol: MappingProtocol, outer: str, words: str
) -> None:
    mapper, router = started((protocol,)), Router(outer=outer)
    run(mapper, router, 0.0, 1.0)
    assert external(mapper) is None
    assert words in mapper.problem
    # What was mapped for nothing is deleted all the same.
    mapper.stop(2.0)
    run(mapper, router, 2.0, 3.0)
    assert (ended(mapper), router.mappings) == (True, {})


def test_private_addresses_when_told_so() -> None:
    assert unusable(("192.168.1.5", 1), public_only=True)
    assert not unusable(("192.168.1.5", 1), public_only=False)
    assert unusable(("224.0.0.1", 1), public_only=False)
    assert unusable((OUTER, 0), public_only=False) == (
        "the outer address that it names is of no use (no port)"
    )


def good_answer(mapper: PortMapper) -> bytes:
    answer = Router().answer(mapper.datagrams_to_send(0.0)[0], 0.0)
    assert answer is not None
    return answer


FORGERIES: dict[str, Callable[[bytes], bytes]] = {
    "nonce": lambda good: good[:24] + bytes((good[24] ^ 1,)) + good[25:],
    "protocol": lambda good: good[:36] + b"\x06" + good[37:],
    "port": lambda good: good[:40] + b"\0\1" + good[42:],
    "opcode": lambda good: b"\2\x82" + good[2:],
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_answers_that_are_not_for_us(forgery: str) -> None:
    mapper = started()
    good = good_answer(mapper)
    timer = mapper.get_timer()
    with pytest.raises(RemoteProtocolError):
        mapper.receive_untrusted(FORGERIES[forgery](good), SERVER, 0.1)
    assert (external(mapper), mapper.get_timer()) == (None, timer)
    mapper.receive_untrusted(good, SERVER, 0.1)
    assert external(mapper) == (OUTER, PORT)


@pytest.mark.parametrize("source", [("10.1.0.9", wire.SERVER_PORT), (ROUTER, 5352)])
def test_answers_of_strangers(source: tuple[str, int]) -> None:
    mapper = started()
    good = good_answer(mapper)
    with pytest.raises(RemoteProtocolError, match="a stranger"):
        mapper.receive_untrusted(good, source, 0.1)
    assert external(mapper) is None


def test_natpmp_answers_that_are_not_for_us() -> None:
    mapper = started(PMP)
    mapper.datagrams_to_send(0.0)
    other = b"\0\x81\0\0\0\0\0\0\0\1\x11\x51\0\0\2\0"
    ours = other[:8] + PORT.to_bytes(2) + other[10:]
    with pytest.raises(RemoteProtocolError, match="not ours"):
        mapper.receive_untrusted(other, SERVER, 0.1)
    mapper.receive_untrusted(ours, SERVER, 0.1)  # not asked for yet
    mapper.receive_untrusted(b"\2\x80" + bytes(22), SERVER, 0.1)  # of PCP, which is not spoken
    assert external(mapper) is None
    mapper.receive_untrusted(b"\0\x81\0\1\0\0\0\0", SERVER, 0.1)
    assert mapper.problem.endswith("it speaks another version")


def test_a_gateway_that_ends_the_mapping() -> None:
    mapper, router = started(), Router()
    run(mapper, router, 0.0, 1.0)
    answer = router.answer(router.heard[0], 2.0)
    assert answer is not None
    # An error that answers nothing says nothing of it.
    mapper.receive_untrusted(answer[:3] + b"\x08" + answer[4:], SERVER, 2.0)
    assert external(mapper) == (OUTER, PORT)
    mapper.receive_untrusted(answer[:4] + bytes(4) + answer[8:], SERVER, 2.0)
    assert external(mapper) is None
    assert mapper.problem.endswith("it has ended the mapping")
    run(mapper, router, 2.0, 2.0 + SHORTEST_REST)
    assert external(mapper) == (OUTER, PORT)


def test_a_gateway_that_forgets_pcp() -> None:
    mapper, router = started(), Router()
    run(mapper, router, 0.0, 1.0)
    refusal = b"\2\x81\0\1" + bytes(20)
    mapper.receive_untrusted(refusal, SERVER, 2.0)  # nothing was asked
    assert external(mapper) == (OUTER, PORT)
    router.pcp = False
    run(mapper, router, 2.0, 61.0)
    assert (spoken(mapper), external(mapper)) == (MappingProtocol.NAT_PMP, (OUTER, PORT))


@pytest.mark.parametrize("protocol", list(MappingProtocol))
def test_stopping(protocol: MappingProtocol) -> None:
    # Before anything was mapped, nor asked to be.
    mapper, router = started((protocol,)), Router(pcp=False, natpmp=False)
    mapper.refused(0.0)
    mapper.stop(0.0)
    assert (ended(mapper), mapper.datagrams_to_send(0.0)) == (True, [])
    # While the gateway is silent: three times, and no longer than 2 s.
    mapper = started((protocol,))
    run(mapper, Router(), 0.0, 0.0)
    mapper.stop(1.0)
    sent = run(mapper, router, 1.0, 3.0)
    assert (ended(mapper), len(sent)) == (True, 3)
    # The gateway refuses to delete, or has another version: nothing more can be done.
    for answer in (Router(result=2), Router(pcp=False)):
        mapper = started((protocol,))
        run(mapper, Router(), 0.0, 0.0)
        mapper.stop(1.0)
        run(mapper, answer, 1.0, 1.0)
        assert ended(mapper)
    # An answer to the request before is not one to the deletion.
    mapper, router = started((protocol,)), Router()
    run(mapper, router, 0.0, 0.0)
    late = router.answer(router.heard[-1], 1.0)
    mapper.stop(1.0)
    assert late is not None
    mapper.receive_untrusted(late, SERVER, 1.0)
    assert not ended(mapper)
    # Nor does an epoch that was reset bring it back.
    mapper.receive_untrusted(bytes((late[0], 0x80)) + bytes(22), SERVER, 1.0)
    assert len(mapper.datagrams_to_send(1.0)[0]) in {12, 60}


@pytest.mark.parametrize(
    ("first", "second", "passed", "lost"),
    [
        (100, 160, 60, False),
        (100, 99, 0.1, False),
        (100, 98, 0.1, True),
        (100, 98, 0.0, True),
        (100, 0, 60, True),
        (100, 155, 60, False),
        (100, 150, 60, True),
        (100, 165, 60, False),
        (100, 175, 60, True),
    ],
)
def test_epochs(first: int, second: int, passed: float, lost: bool) -> None:
    epoch = Epoch()
    assert not epoch.lost_state(first, 7.0)
    assert epoch.lost_state(second, 7.0 + passed) is lost
    assert epoch.restarts == lost


def test_a_pinhole_of_ipv6() -> None:
    """The same request, with our IPv6 address, to a router that is known by its link-local one; no
    wish is `::` there. What it leads to is our own address (RFC 6887 section 11.1)."""
    own, router = "2a0e::2", ("fe80::1%eth0", wire.SERVER_PORT)
    packed = bytes.fromhex("2a0e") + bytes(13) + b"\2"
    mapper = PortMapper(own, router[0], PORT, random.Random(1), (MappingProtocol.PCP,))
    mapper.start(0.0)
    (request,) = mapper.datagrams_to_send(0.0)
    port = PORT.to_bytes(2)
    assert request[:8] == b"\2\1\0\0" + LIFETIME.to_bytes(4)
    assert request[8:24] == packed
    nonce = request[24:36]
    assert request[36:] == b"\x11\0\0\0" + port + port + bytes(16)
    head = b"\2\x81\0\0" + LIFETIME.to_bytes(4) + bytes(4) + bytes(12)
    answer = head + nonce + b"\x11\0\0\0" + port + port + packed
    with pytest.raises(RemoteProtocolError, match="a stranger"):
        mapper.receive_untrusted(answer, ("fe80::2%eth0", wire.SERVER_PORT), 0.1)
    assert external(mapper) is None
    mapper.receive_untrusted(answer, router, 0.1)
    assert external(mapper) == (own, PORT)
