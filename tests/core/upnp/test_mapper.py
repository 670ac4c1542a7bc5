"""A port mapper by UPnP and a gateway back to back, in virtual time."""

import contextlib
import random
from collections.abc import Callable

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.upnp.gateway import (
    HOST,
    OUTER,
    PORT,
    PPP,
    ROUTER,
    SEARCH_ANSWER,
    V1,
    V2,
    Gateway,
    answer,
    result,
)
from ztna.core.portmap import LIFETIME, LONGEST_REST, LOOK_INTERVAL, REST, SHORTEST_REST
from ztna.core.upnp.mapper import (
    OTHER_PORTS,
    REQUEST_TIME,
    REQUESTS,
    SEARCH_TIME,
    SEARCHES,
    UpnpMapper,
)
from ztna.errors import RemoteProtocolError

SSDP_SOURCE = (ROUTER, 1900)
FIRST = ["/rootDesc.xml", "GetExternalIPAddress", "AddAnyPortMapping"]


@attrs.define
class Talk:
    """gateway: None while it is away. spoil: what becomes of its answers. now: s."""

    mapper: UpnpMapper
    gateway: Gateway | None
    spoil: Callable[[bytes], bytes] = lambda data: data
    silent: bool = False
    now: float = 0.0
    searches: int = 0
    requests: int = 0

    def settle(self) -> None:
        """Say what is to be said now."""
        while True:
            for _ in self.mapper.datagrams_to_send(self.now):
                self.searches += 1
                if self.gateway is not None:
                    self.mapper.receive_datagram_untrusted(SEARCH_ANSWER, SSDP_SOURCE, self.now)
            request = self.mapper.request_to_send(self.now)
            if request is None:
                return
            self.requests += 1
            if self.silent:
                return
            if self.gateway is None:
                self.mapper.failed(self.now)  # refused
                continue
            assert request.port == 43507
            data = self.spoil(self.gateway.answer(request.data))
            try:
                assert self.mapper.receive_response_untrusted(data, self.now, ended=True)
            except RemoteProtocolError:
                self.mapper.failed(self.now)

    def step(self) -> None:
        """To the next timer."""
        timer = self.mapper.get_timer()
        assert timer is not None
        self.now = max(self.now, timer)
        self.mapper.handle_timer(self.now)
        self.settle()

    def until(self, end: float) -> None:
        """All that happens up to a time."""
        while (timer := self.mapper.get_timer()) is not None and timer <= end:
            self.step()
        self.now = end


def begun(
    gateway: Gateway | None = None, spoil: Callable[[bytes], bytes] = lambda data: data
) -> Talk:
    mapper = UpnpMapper(HOST, ROUTER, PORT, random.Random(1))
    talk = Talk(mapper, gateway or Gateway(), spoil)
    mapper.start(0.0)
    talk.settle()
    return talk


def nobody() -> Talk:
    mapper = UpnpMapper(HOST, ROUTER, PORT, random.Random(1))
    mapper.start(0.0)
    talk = Talk(mapper, None)
    talk.settle()
    return talk


def test_mapped_and_deleted() -> None:
    gateway = Gateway()
    talk = begun(gateway)
    assert gateway.heard == FIRST
    assert (talk.mapper.external, talk.mapper.problem) == ((OUTER, PORT), "")
    assert gateway.mappings == {PORT: (HOST, PORT)}
    talk.mapper.stop(1.0)
    talk.settle()
    assert talk.mapper.external is None
    assert talk.mapper.done
    assert gateway.mappings == {}
    assert talk.mapper.get_timer() is None
    assert talk.mapper.request_to_send(2.0) is None


@pytest.mark.parametrize("kind", [V1, PPP])
def test_older_services(kind: str) -> None:
    gateway = Gateway(((kind, "/ctl"),))
    talk = begun(gateway)
    assert gateway.heard[-1] == "AddPortMapping"
    assert talk.mapper.external == (OUTER, PORT)


@pytest.mark.parametrize("code", [401, 602])
def test_new_service_without_the_new_action(code: int) -> None:
    gateway = Gateway(faults={"AddAnyPortMapping": code})
    talk = begun(gateway)
    assert gateway.heard == [*FIRST, "AddPortMapping"]
    talk.until(LIFETIME)
    assert gateway.heard.count("AddAnyPortMapping") == 1


def test_of_several_connections_the_one_that_is_up() -> None:
    gateway = Gateway(((V1, "/ip"), (PPP, "/ppp")))

    def first_is_down(data: bytes) -> bytes:
        down = gateway.heard.count("GetExternalIPAddress") == 1
        empty = result("GetExternalIPAddress", {"NewExternalIPAddress": ""})
        return empty if down and gateway.heard[-1] == "GetExternalIPAddress" else data

    talk = begun(gateway, spoil=first_is_down)
    assert talk.mapper.external == (OUTER, PORT)


def test_nobody_answers() -> None:
    talk = nobody()
    talk.until(SEARCHES * SEARCH_TIME + REST - 1)
    assert (talk.searches, talk.requests) == (SEARCHES, 0)
    assert talk.mapper.problem == "it does not offer it"
    talk.gateway = Gateway()
    talk.step()
    assert talk.mapper.external == (OUTER, PORT)
    assert talk.mapper.problem == ""


def test_stopped_while_it_searches() -> None:
    talk = nobody()
    talk.mapper.stop(0.5)
    assert talk.mapper.done


def test_stopped_while_it_maps() -> None:
    """Perhaps the gateway has it already."""
    gateway = Gateway()
    mapper = UpnpMapper(HOST, ROUTER, PORT, random.Random(1))
    mapper.start(0.0)
    talk = Talk(mapper, gateway)
    mapper.datagrams_to_send(0.0)
    mapper.receive_datagram_untrusted(SEARCH_ANSWER, SSDP_SOURCE, 0.0)
    for _ in range(2):
        request = mapper.request_to_send(0.0)
        assert request is not None
        mapper.receive_response_untrusted(gateway.answer(request.data), 0.0, ended=True)
    request = mapper.request_to_send(0.0)
    assert request is not None
    gateway.answer(request.data)
    assert gateway.mappings
    mapper.stop(0.1)
    talk.settle()
    assert mapper.done
    assert gateway.mappings == {}


@pytest.mark.parametrize("way", ["silent", "refused", "nonsense", "fault"])
def test_delete_that_fails(way: str) -> None:
    gateway = Gateway()
    talk = begun(gateway)
    talk.silent = way == "silent"
    if way == "refused":
        talk.gateway = None
    if way == "nonsense":
        talk.spoil = lambda _: b"nonsense\r\n\r\n"
    if way == "fault":
        gateway.faults["DeletePortMapping"] = 606
    talk.mapper.stop(talk.now)
    talk.settle()
    if way == "silent":
        talk.until(REQUESTS * REQUEST_TIME)
    assert talk.mapper.done


@pytest.mark.parametrize("outer", ["10.64.0.9", "100.64.3.2", "192.168.1.2"])
def test_another_nat_is_above(outer: str) -> None:
    """Nothing is mapped, and it is said; later perhaps."""
    gateway = Gateway(outer=outer)
    talk = begun(gateway)
    assert talk.mapper.external is None
    assert talk.mapper.problem == f"its own outer address is {outer}, so another NAT is above it"
    assert gateway.mappings == {}
    gateway.outer = OUTER
    talk.until(REST + 1)
    assert talk.mapper.external == (OUTER, PORT)


def test_private_addresses_where_they_are_wanted() -> None:
    gateway = Gateway(outer="10.64.0.9")
    mapper = UpnpMapper(HOST, ROUTER, PORT, random.Random(1), public_only=False)
    mapper.start(0.0)
    Talk(mapper, gateway).settle()
    assert mapper.external == ("10.64.0.9", PORT)


@pytest.mark.parametrize("outer", ["", "0.0.0.0", "words", "::1", "127.0.0.1"])
def test_no_outer_address(outer: str) -> None:
    talk = begun(Gateway(outer=outer))
    assert talk.mapper.external is None
    assert talk.mapper.problem
    assert talk.gateway is not None
    assert talk.gateway.mappings == {}


@pytest.mark.parametrize(
    ("code", "words", "seconds"),
    [
        (501, "it cannot do it now", REST),
        (606, "it does not allow it", LONGEST_REST),
        (724, "gives no other", REST),
        (725, "mappings without an end alone", LONGEST_REST),
        (728, "no port left", REST),
        (999, "error 999", REST),
    ],
)
def test_refusals(code: int, words: str, seconds: float) -> None:
    gateway = Gateway(((V1, "/ctl"),), faults={"AddPortMapping": code})
    talk = begun(gateway)
    assert words in talk.mapper.problem
    heard = len(gateway.heard)
    talk.until(seconds - 1)
    assert len(gateway.heard) == heard
    gateway.faults.clear()
    talk.until(seconds + 1)
    assert talk.mapper.external == (OUTER, PORT)


@pytest.mark.parametrize("kind", [V1, V2])
def test_taken_port(kind: str) -> None:
    """Another one then; that of the gateway's choice, or of ours."""
    gateway = Gateway(((kind, "/ctl"),), mappings={PORT: ("10.1.0.9", PORT)})
    talk = begun(gateway)
    assert talk.mapper.external is not None
    host, port = talk.mapper.external
    assert host == OUTER
    assert port == 40_000 if kind == V2 else port >= 49_152
    assert gateway.mappings == {PORT: ("10.1.0.9", PORT), port: (HOST, PORT)}
    talk.until(LIFETIME)
    assert talk.mapper.external == (host, port)
    talk.mapper.stop(talk.now)
    talk.settle()
    assert gateway.mappings == {PORT: ("10.1.0.9", PORT)}


@pytest.mark.parametrize("code", [718, 729])
def test_all_ports_taken(code: int) -> None:
    gateway = Gateway(((V1, "/ctl"),), faults={"AddPortMapping": code})
    talk = begun(gateway)
    assert gateway.heard.count("AddPortMapping") == 1 + OTHER_PORTS
    assert "are taken" in talk.mapper.problem


def test_looks_every_minute_and_renews_at_half() -> None:
    gateway = Gateway()
    talk = begun(gateway)
    talk.mapper.handle_timer(1.0)  # too early
    talk.until(LOOK_INTERVAL)
    assert gateway.heard == [*FIRST, "GetExternalIPAddress", "GetSpecificPortMappingEntry"]
    talk.until(20 * LIFETIME)
    assert talk.mapper.external == (OUTER, PORT)
    assert 32 <= gateway.heard.count("AddAnyPortMapping") <= 41
    assert gateway.heard.count("/rootDesc.xml") == 1


def test_gateway_that_has_lost_it() -> None:
    gateway = Gateway()
    talk = begun(gateway)
    gateway.mappings.clear()
    talk.until(LOOK_INTERVAL)
    assert gateway.mappings == {PORT: (HOST, PORT)}


def test_gateway_that_has_given_it_to_another() -> None:
    gateway = Gateway()
    talk = begun(gateway)
    gateway.mappings[PORT] = ("10.1.0.9", 5)
    talk.until(LOOK_INTERVAL)
    assert talk.mapper.external is not None
    assert talk.mapper.external[1] != PORT
    assert gateway.mappings[PORT] == ("10.1.0.9", 5)


def test_gateway_with_another_address() -> None:
    gateway = Gateway()
    talk = begun(gateway)
    gateway.outer = "11.0.0.21"
    talk.until(LOOK_INTERVAL)
    assert talk.mapper.external == ("11.0.0.21", PORT)


def test_gateway_that_does_not_let_us_look() -> None:
    """It is renewed all the same, and its address is looked at."""
    gateway = Gateway(faults={"GetSpecificPortMappingEntry": 401})
    talk = begun(gateway)
    talk.until(2 * LIFETIME)
    assert gateway.heard.count("GetSpecificPortMappingEntry") == 1
    assert talk.mapper.external == (OUTER, PORT)


def test_gateway_that_starts_anew() -> None:
    """It is searched for at once, and what it was told stays until its end."""
    gateway = Gateway()
    talk = begun(gateway)
    talk.gateway = None
    talk.until(LOOK_INTERVAL + 20)
    assert talk.searches == 1 + SEARCHES
    assert talk.mapper.external == (OUTER, PORT)
    gateway.mappings.clear()
    talk.gateway = gateway
    talk.until(LOOK_INTERVAL + 20 + SHORTEST_REST)
    assert gateway.mappings == {PORT: (HOST, PORT)}
    assert gateway.heard.count("/rootDesc.xml") == 2


def test_gateway_that_stays_away() -> None:
    talk = begun(Gateway())
    talk.gateway = None
    talk.until(LIFETIME - 1)
    given = talk.mapper.external
    talk.until(LIFETIME + 1)
    assert given == (OUTER, PORT)
    assert talk.mapper.external is None
    assert talk.mapper.problem
    talk.gateway = Gateway()
    talk.until(LIFETIME + REST + 10)
    assert talk.mapper.external == (OUTER, PORT)


def test_gateway_that_falls_silent() -> None:
    """What it gave ends when it would end there."""
    talk = begun(Gateway())
    talk.silent = True
    talk.until(LIFETIME - 1)
    given = talk.mapper.external
    talk.mapper.handle_timer(LIFETIME)
    assert given == (OUTER, PORT)
    assert talk.mapper.external is None
    assert talk.mapper.problem


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("way", ["silent", "refused", "nonsense"])
def test_gateway_that_talks_nonsense(step: int, way: str) -> None:
    """Each request is made again once, then the gateway is left alone for a while."""
    gateway = Gateway()
    mapper = UpnpMapper(HOST, ROUTER, PORT, random.Random(1))
    talk = Talk(mapper, gateway)

    def spoil(data: bytes) -> bytes:
        return data if len(gateway.heard) <= step else b"nonsense\r\n\r\n"

    talk.spoil = spoil
    mapper.start(0.0)
    if way == "nonsense":
        talk.settle()
    else:
        mapper.datagrams_to_send(0.0)
        mapper.receive_datagram_untrusted(SEARCH_ANSWER, SSDP_SOURCE, 0.0)
        for _ in range(step):
            request = mapper.request_to_send(0.0)
            assert request is not None
            mapper.receive_response_untrusted(gateway.answer(request.data), 0.0, ended=True)
        talk.silent, talk.gateway = way == "silent", None
        talk.settle()
        talk.until(REQUESTS * REQUEST_TIME)
    assert talk.requests + step * (way != "nonsense") == step + REQUESTS
    assert mapper.problem == "it does not answer as UPnP wants it"
    talk.silent, talk.gateway, talk.spoil = False, gateway, lambda data: data
    talk.until(talk.now + SHORTEST_REST)
    assert mapper.external == (OUTER, PORT)


@pytest.mark.parametrize("port", ["0", "65536", "", "x", "²"])
def test_mapping_without_a_port(port: str) -> None:
    gateway = Gateway()
    broken = result("AddAnyPortMapping", {"NewReservedPort": port})
    talk = begun(
        gateway, spoil=lambda data: broken if gateway.heard[-1] == "AddAnyPortMapping" else data
    )
    assert talk.mapper.external is None
    assert talk.mapper.problem == "it does not answer as UPnP wants it"


def test_answers_of_strangers_and_late_ones() -> None:
    talk = nobody()
    with pytest.raises(RemoteProtocolError, match=r"10\.1\.0\.66, not the gateway"):
        talk.mapper.receive_datagram_untrusted(SEARCH_ANSWER, ("10.1.0.66", 1900), 0.1)
    with pytest.raises(RemoteProtocolError):
        talk.mapper.receive_datagram_untrusted(b"nonsense", SSDP_SOURCE, 0.1)
    assert talk.mapper.request_to_send(0.1) is None
    # From any port: not all answer from 1900.
    talk.mapper.receive_datagram_untrusted(SEARCH_ANSWER, (ROUTER, 50_000), 0.1)
    assert talk.mapper.request_to_send(0.1) is not None
    talk.mapper.receive_datagram_untrusted(SEARCH_ANSWER, SSDP_SOURCE, 0.2)
    assert talk.mapper.request_to_send(0.2) is None  # it is under way
    assert not talk.mapper.receive_response_untrusted(b"HTTP/1.1 200", 0.2, ended=False)


def test_what_nobody_asked_for() -> None:
    talk = begun(Gateway())
    assert talk.mapper.receive_response_untrusted(answer("<a/>"), 1.0, ended=True)
    talk.mapper.failed(1.0)
    assert talk.mapper.external == (OUTER, PORT)


def test_description_without_a_service() -> None:
    gateway = Gateway(())
    talk = begun(gateway)
    assert "names no service" in talk.mapper.problem
    gateway.services = ((V1, "/ctl"),)
    talk.until(REST + 1)
    assert talk.mapper.external == (OUTER, PORT)


@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=60)), max_size=12), st.randoms())
def test_any_answers(lies: list[tuple[bool, bytes]], source: random.Random) -> None:
    """Whatever a gateway says: no other error, no busy loop, and it ends when told so."""
    gateway = Gateway()

    def spoil(data: bytes) -> bytes:
        if not lies:
            return data
        cut, lie = lies.pop()
        at = source.randrange(len(data))
        return lie if cut else data[:at] + lie + data[at + len(lie) :]

    mapper = UpnpMapper(HOST, ROUTER, PORT, random.Random(1))
    talk = Talk(mapper, gateway, spoil)
    mapper.start(0.0)
    with contextlib.suppress(RemoteProtocolError):
        mapper.receive_datagram_untrusted(spoil(SEARCH_ANSWER), SSDP_SOURCE, 0.0)
    talk.settle()
    for _ in range(40):
        before = talk.now
        talk.step()
        assert talk.now > before or mapper.external is not None
    assert talk.requests < 300
    mapper.stop(talk.now)
    talk.settle()
    assert mapper.done
