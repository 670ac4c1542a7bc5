"""The relay: what passes, what is converted, and a counter for everything else."""

import ipaddress

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers import inet

from tests.core.super_packets import A4, A6, B4, payload_of, tcp_super_packet, transport_is_valid
from ztna.core import wire
from ztna.core.addresses import packed_pair
from ztna.core.encapsulation import Decapsulator
from ztna.core.identity import Identity, Role
from ztna.core.offload import segment, slice_super_packet
from ztna.core.packet.udp import build_udp_packet
from ztna.core.policy import Policy, PolicyRule
from ztna.core.reassembly import fragment
from ztna.core.registry import MAX_DESTINATIONS, Client, Registry
from ztna.core.relay import UNKNOWN_SERVICE_BURST, UNKNOWN_SERVICE_RATE, Relay
from ztna.core.wire import FEATURES, Feature

POLICY = Policy.of(
    "example.net",
    [PolicyRule("agent/*", services=("*",)), PolicyRule("connector/*", provides=("*",))],
)
LAPTOP, PHONE = bytes([10, 100, 64, 7]), bytes([10, 100, 64, 8])
WEB_IP, SSH_IP = bytes([10, 100, 0, 1]), bytes([10, 100, 0, 2])
WEB, SSH = 1, 2


def udp(source: bytes, destination: bytes, payload: bytes = b"ping") -> bytes:
    return build_udp_packet(source, destination, 5000, 9999, payload)


OUT, BACK = udp(LAPTOP, WEB_IP), udp(WEB_IP, LAPTOP)
OUT6 = udp(A6, bytes.fromhex("fd7a746e61000000000000000a640001"))


def short(number: int, packet: bytes) -> bytes:
    return b"\x20" + number.to_bytes(2, "big") + packet


@attrs.define
class Lab:
    """A relay, its clients by name, and what each batch gave."""

    relay: Relay = attrs.Factory(lambda: Relay(Registry(POLICY)))
    clients: dict[str, Client] = attrs.Factory(dict)

    def join(
        self,
        name: str,
        services: list[str],
        *,
        address: bytes | None = None,
        features: frozenset[Feature] = FEATURES,
        seed: bool = False,
        max_size: int = 1170,
    ) -> Client:
        role = Role.CONNECTOR if name.startswith("home") else Role.AGENT
        client = Client(len(self.clients) + 1, Identity("example.net", role, name), max_size)
        self.clients[name] = client
        self.relay.registry.add(client)
        self.relay.add(client)
        if not seed:
            client.features, client.speaks_control = features, True
            self.relay.add(client)
        if address is not None:
            pair = packed_pair(ipaddress.IPv4Address(address))
            self.relay.registry.assign_addresses(client, frozenset(pair))
        for service in services:
            assert self.relay.registry.register(client, service).refusal is None
        return client

    def send(self, name: str, *messages: bytes, now: float = 0.0) -> dict[str, list[bytes]]:
        outgoing = self.relay.receive_messages(self.clients[name], messages, now)
        return {client.identity.name: batch for client, batch in outgoing.items()}

    @property
    def dropped(self) -> dict[str, int]:
        return {k[5:]: v for k, v in self.relay.statistics().items() if k != "forwarded" and v}


def lab(
    *, features: frozenset[Feature] = FEATURES, seed: bool = False, max_size: int = 1170
) -> Lab:
    """laptop and phone may use web and ssh; home provides web, and is what the arguments say."""
    found = Lab()
    found.join("laptop", ["web", "ssh"], address=LAPTOP)
    found.join("phone", ["web", "ssh"], address=PHONE)
    found.join("home", ["web"], features=features, seed=seed, max_size=max_size)
    return found


# What passes unchanged.


def test_short_there_and_back() -> None:
    found = lab()
    assert found.send("laptop", short(WEB, OUT)) == {"home": [short(WEB, OUT)]}
    assert found.send("home", short(WEB, BACK)) == {"laptop": [short(WEB, BACK)]}
    assert found.relay.statistics() == {
        "forwarded": 2,
        "drop_malformed": 0,
        "drop_too_large": 0,
        "drop_fragments_given_up": 0,
    }


def test_ipv6_twins() -> None:
    found = lab()
    assert found.send("laptop", short(WEB, OUT6)) == {"home": [short(WEB, OUT6)]}
    back = udp(OUT6[24:40], OUT6[8:24])
    assert found.send("home", short(WEB, back)) == {"laptop": [short(WEB, back)]}


def test_slices_pass_as_they_are_in_order() -> None:
    found = lab()
    slices = slice_super_packet(tcp_super_packet(payload_of(9000)), WEB, 5, 1170)
    found.relay.registry.assign_addresses(found.clients["laptop"], frozenset([A4]))
    batch = [*slices[:3], short(WEB, udp(A4, B4)), *slices[3:]]
    assert found.send("laptop", *batch) == {"home": batch}


def test_a_container_for_one_connector_passes_as_it_is() -> None:
    found = lab()
    container = wire.encode_container([(WEB, OUT), (WEB, OUT6)])
    batch = [short(WEB, OUT), container, short(WEB, OUT)]
    assert found.send("laptop", *batch) == {"home": batch}


# Who may.


def test_an_agent_sends_from_its_own_address_alone() -> None:
    found = lab()
    spoofed = udp(PHONE, WEB_IP)
    assert found.send("laptop", short(WEB, spoofed), short(WEB, spoofed), short(WEB, OUT)) == {
        "home": [short(WEB, OUT)]
    }
    assert found.dropped == {"source_address": 2}
    assert found.send("laptop", wire.encode_container([(WEB, spoofed)])) == {}
    assert found.send("laptop", wire.encode_routed("web", spoofed)) == {}
    assert found.dropped == {"source_address": 4}


def test_a_connector_answers_only_from_addresses_that_were_asked() -> None:
    found = lab()
    found.send("laptop", short(WEB, OUT))
    spoofed = udp(SSH_IP, LAPTOP)
    for message in (short(WEB, spoofed), wire.encode_routed("web", spoofed), spoofed):
        assert found.send("home", message) == {}
    assert found.dropped == {"not_asked": 3}


def test_an_answer_reaches_only_the_agent_that_asked() -> None:
    found = lab()
    found.send("laptop", short(WEB, OUT))
    to_phone = udp(WEB_IP, PHONE)
    assert found.send("home", short(WEB, to_phone)) == {}
    assert found.send("home", to_phone) == {}
    assert found.send("home", short(SSH, BACK)) == {}, "asked for web, not for ssh"
    assert found.send("home", short(77, BACK)) == {}
    assert found.send("home", wire.encode_routed("ftp", BACK)) == {}
    assert found.dropped == {"not_asked": 5}
    nobody = udp(WEB_IP, bytes([10, 100, 64, 99]))
    assert found.send("home", short(WEB, nobody)) == {}
    assert found.dropped["no_such_agent"] == 1


def test_another_connector_of_the_service_cannot_answer() -> None:
    found = lab()
    found.join("home-2", ["web"])
    found.send("laptop", short(WEB, OUT))
    assert found.send("home-2", short(WEB, BACK)) == {}
    assert found.dropped == {"not_asked": 1}
    assert found.send("phone", short(WEB, udp(PHONE, WEB_IP))) == {
        "home-2": [short(WEB, udp(PHONE, WEB_IP))]
    }


def test_services_that_were_not_registered() -> None:
    found = lab()
    for message in (short(3, OUT), short(0, OUT), wire.encode_routed("ftp", OUT), OUT):
        assert found.send("laptop", message) == {}
    assert found.dropped == {"no_right_to_service": 4}, "bare needs a single service"


def test_datagrams_to_unknown_services_have_a_rate() -> None:
    assert (UNKNOWN_SERVICE_RATE, UNKNOWN_SERVICE_BURST) == (64.0, 1024.0)
    found = lab()
    batch = [short(number, OUT) for number in range(1000, 1500)]
    for now in (0.0, 0.0, 0.0):
        assert found.send("laptop", *batch, now=now) == {}
    assert found.dropped == {"no_right_to_service": 1024, "unknown_service_rate": 476}
    # What it may reach it reaches; half a second later 32 more count as before.
    assert found.send("laptop", short(WEB, OUT), *batch, now=0.5) != {}
    assert found.dropped == {"no_right_to_service": 1056, "unknown_service_rate": 944}
    assert found.send("phone", short(999, udp(PHONE, WEB_IP)), now=0.5) == {}
    assert found.dropped["no_right_to_service"] == 1057, "each session has its own"


def test_too_many_destinations() -> None:
    found = lab()
    packets = [udp(LAPTOP, bytes([10, 100, 0, n])) for n in range(1, MAX_DESTINATIONS + 2)]
    outgoing = found.send("laptop", *[short(WEB, packet) for packet in packets])
    assert len(outgoing["home"]) == MAX_DESTINATIONS
    assert found.dropped == {"too_many_destinations": 1}
    assert found.send("laptop", short(WEB, packets[0])) != {}


# A connector that is not there.


@pytest.mark.parametrize("form", ["short", "container", "routed"])
def test_no_connector_answers_unreachable(form: str) -> None:
    found = lab()
    packet = udp(LAPTOP, SSH_IP)
    message = {
        "short": short(SSH, packet),
        "container": wire.encode_container([(SSH, packet)]),
        "routed": wire.encode_routed("ssh", packet),
    }[form]
    (answer,) = found.send("laptop", message)["laptop"]
    assert answer[:3] == b"\x20\x00\x02"
    oracle = inet.IP(answer[3:])
    assert (oracle.src, oracle.dst) == ("10.100.0.2", "10.100.64.7")
    icmp = oracle[inet.ICMP]
    assert (icmp.type, icmp.code) == (3, 1)
    assert bytes(icmp.payload) == packet
    assert found.dropped == {"no_connector": 1}


def test_silence_while_a_newer_session_of_the_connector_registers() -> None:
    found = lab()
    newer = found.join("home", [])
    assert found.send("laptop", short(WEB, OUT)) == {}
    assert found.dropped == {"connector_begins_anew": 1}
    found.relay.registry.settle(newer)
    assert found.send("laptop", short(WEB, OUT)).keys() == {"laptop"}, "it did not come back"


def test_errors_to_an_agent_have_a_rate() -> None:
    """RFC 4443 section 2.4 (f); each session has its own."""
    found = lab()
    message = short(SSH, udp(LAPTOP, SSH_IP))
    answered = [found.send("laptop", message, now=0.0) != {} for _ in range(1030)]
    assert answered == [True] * 1024 + [False] * 6
    assert found.dropped == {"no_connector": 1030, "error_rate": 6}
    assert found.send("laptop", message, now=0.5) != {}


def test_one_unreachable_a_batch_and_none_about_errors() -> None:
    found = lab()
    packet = udp(LAPTOP, SSH_IP)
    outgoing = found.send("laptop", *[short(SSH, packet)] * 5)
    assert len(outgoing["laptop"]) == 1
    assert found.dropped == {"no_connector": 5}
    (answer,) = outgoing["laptop"]
    error = bytearray(answer[3:])
    error[12:16], error[16:20] = LAPTOP, SSH_IP
    assert found.send("laptop", short(SSH, bytes(error))) == {}
    assert found.dropped == {"no_connector": 6}


def test_flows_move_when_the_connector_is_gone() -> None:
    found = lab()
    found.join("home-2", ["web"])
    found.send("laptop", short(WEB, OUT))
    found.relay.registry.remove(found.clients["home"])
    found.relay.remove(found.clients["home"])
    assert found.send("laptop", short(WEB, OUT)) == {"home-2": [short(WEB, OUT)]}


# Conversion.


def test_a_seed_connector_of_one_service_gets_and_gives_bare_packets() -> None:
    found = lab(seed=True)
    assert found.send("laptop", short(WEB, OUT)) == {"home": [OUT]}
    assert found.send("laptop", wire.encode_container([(WEB, OUT), (WEB, OUT6)])) == {
        "home": [OUT, OUT6]
    }
    assert found.send("home", BACK) == {"laptop": [short(WEB, BACK)]}


def test_a_seed_connector_of_two_services_gets_labels() -> None:
    found = lab(seed=True)
    home = found.clients["home"]
    found.relay.registry.register(home, "ssh")
    assert found.send("laptop", short(WEB, OUT)) == {"home": [b"\x2f\x03web" + OUT]}
    assert found.send("home", b"\x2f\x03web" + BACK) == {"laptop": [short(WEB, BACK)]}
    found.relay.registry.withdraw(home, "ssh")
    assert found.send("laptop", short(WEB, OUT)) == {"home": [OUT]}, "bare again"


def test_slices_become_plain_packets_for_a_seed_connector() -> None:
    found = lab(seed=True)
    laptop = found.clients["laptop"]
    found.relay.registry.assign_addresses(laptop, frozenset([A4, LAPTOP]))
    super_packet = tcp_super_packet(payload_of(5000), flags=0x18)
    slices = slice_super_packet(super_packet, WEB, 0, 1170)
    bare = found.send("laptop", short(WEB, udp(A4, B4)), *slices, short(WEB, OUT))["home"]
    assert bare[1:-1] == segment(super_packet)
    assert all(transport_is_valid(packet) for packet in bare)
    assert (bare[0], bare[-1]) == (udp(A4, B4), OUT)


def test_slices_of_two_services_for_a_seed_connector_do_not_mix() -> None:
    found = lab(seed=True)
    found.relay.registry.register(found.clients["home"], "ssh")
    found.relay.registry.assign_addresses(found.clients["laptop"], frozenset([A4]))
    super_packet = tcp_super_packet(payload_of(2000))
    web, ssh = (slice_super_packet(super_packet, n, 0, 1170) for n in (WEB, SSH))
    got = found.send("laptop", *web, *ssh)["home"]
    packets = segment(super_packet)
    assert got == [
        *[b"\x2f\x03web" + packet for packet in packets],
        *[b"\x2f\x03ssh" + packet for packet in packets],
    ]


def test_seed_agent_and_modern_connector() -> None:
    found = Lab()
    found.join("laptop", ["web"], seed=True)
    found.join("home", ["web"])
    packet = udp(bytes([192, 0, 2, 9]), WEB_IP)
    assert found.send("laptop", packet) == {"home": [short(WEB, packet)]}
    assert found.send("laptop", packet, b"\x2f\x03web" + packet)["home"] == [
        wire.encode_container([(WEB, packet), (WEB, packet)])
    ]
    back = udp(WEB_IP, bytes([192, 0, 2, 9]))
    assert found.send("home", short(WEB, back)) == {"laptop": [back]}
    other = udp(bytes([192, 0, 2, 10]), WEB_IP)
    assert found.send("laptop", other) == {}
    assert found.dropped == {"source_address": 1}


def test_a_container_with_mixed_targets_is_split() -> None:
    found = lab()
    found.join("home-2", ["ssh"])
    ssh = udp(LAPTOP, SSH_IP)
    container = wire.encode_container([(WEB, OUT), (SSH, ssh), (WEB, OUT6), (9, OUT)])
    assert found.send("laptop", short(WEB, OUT), container, short(WEB, OUT)) == {
        "home": [
            short(WEB, OUT),
            wire.encode_container([(WEB, OUT), (WEB, OUT6)]),
            short(WEB, OUT),
        ],
        "home-2": [short(SSH, ssh)],
    }
    assert found.dropped == {"no_right_to_service": 1}


def test_a_container_for_two_connectors_is_split() -> None:
    found = lab()
    found.join("home-2", ["ssh"])
    ssh = udp(LAPTOP, SSH_IP)
    assert found.send("laptop", wire.encode_container([(WEB, OUT), (SSH, ssh)])) == {
        "home": [short(WEB, OUT)],
        "home-2": [short(SSH, ssh)],
    }


def test_a_container_whose_first_entry_is_dropped() -> None:
    found = lab()
    container = wire.encode_container([(9, OUT), (WEB, OUT)])
    assert found.send("laptop", container) == {"home": [short(WEB, OUT)]}


def test_a_container_for_who_knows_none_is_taken_apart() -> None:
    found = lab(features=frozenset({Feature.SHORT}))
    container = wire.encode_container([(WEB, OUT), (WEB, OUT)])
    assert found.send("laptop", container) == {"home": [short(WEB, OUT)] * 2}


def test_a_container_larger_than_the_next_leg_is_packed_anew() -> None:
    found = lab(max_size=2 * len(OUT) + 10)
    container = wire.encode_container([(WEB, OUT)] * 3)
    assert found.send("laptop", container) == {
        "home": [wire.encode_container([(WEB, OUT)] * 2), short(WEB, OUT)]
    }


def test_what_is_too_large_for_the_next_leg_is_cut_or_counted() -> None:
    found = lab(max_size=600)
    large = udp(LAPTOP, WEB_IP, payload_of(1000))
    cut = found.send("laptop", short(WEB, OUT), short(WEB, large))["home"]
    assert [message[0] for message in cut] == [0x20, 0x23, 0x23]
    assert max(map(len, cut)) == 600
    ((_, packet),) = Decapsulator().decapsulate(cut[1:], 0.0)
    assert packet.data == large
    unable = lab(max_size=600, features=frozenset({Feature.SHORT}))
    assert unable.send("laptop", short(WEB, large)) == {}
    assert unable.dropped == {"too_large": 1}
    unable.relay.remove(unable.clients["home"])
    assert unable.dropped == {"too_large": 1}, "counters do not go back"


# Fragments.


def test_fragments_are_joined_and_cut_again() -> None:
    found = lab()
    large = udp(LAPTOP, WEB_IP, payload_of(3000))
    pieces = fragment(short(WEB, large), 9, 1170)
    assert found.send("laptop", *pieces[:2]) == {}
    outgoing = found.send("laptop", pieces[2])["home"]
    assert [message[:5].hex() for message in outgoing] == ["2300000003", "2300000103", "2300000203"]
    ((_, packet),) = Decapsulator().decapsulate(outgoing, 0.0)
    assert packet.data == large
    assert found.relay.forwarded == 3, "each message counts once"


@pytest.mark.parametrize(
    "message",
    [
        short(WEB, OUT),
        wire.encode_container([(WEB, OUT)]),
        b"\x2f\x03web" + OUT,
    ],
)
def test_every_form_may_come_in_fragments(message: bytes) -> None:
    found = lab()
    assert found.send("laptop", *fragment(message, 1, 25)) == found.send("laptop", message)


def test_fragments_of_two_clients_do_not_meet() -> None:
    found = lab()
    pieces = fragment(short(WEB, OUT), 1, 25)
    assert found.send("laptop", pieces[0]) == {}
    assert found.send("phone", *pieces[1:]) == {}
    assert found.send("laptop", *pieces[1:]) == {"home": [short(WEB, OUT)]}


def test_a_fragment_of_a_fragment_is_malformed() -> None:
    found = lab()
    inner = fragment(short(WEB, OUT), 1, 25)[0]
    assert found.send("laptop", *fragment(inner, 2, 20)) == {}
    assert found.dropped == {"malformed": 1}


def test_fragments_that_are_given_up_are_counted() -> None:
    found = lab()
    first, *_ = fragment(short(WEB, OUT), 1, 25)
    found.send("laptop", first, now=0.0)
    found.send("laptop", first, now=2.0)
    assert found.dropped == {"fragments_given_up": 1}
    found.relay.add(found.clients["laptop"])
    assert found.dropped == {"fragments_given_up": 1}


def test_what_the_relay_of_peers_is_to_have_waits_for_it() -> None:
    """Whole, in order, and of this batch alone; also where nothing plain is carried."""
    found = lab()
    found.relay.plain = False
    inner = b"\x30" + bytes(8) + payload_of(2000)
    pieces = fragment(inner, 5, 1170)
    plain = fragment(short(WEB, OUT), 6, 25)
    assert found.send("laptop", b"\x31abc", *plain, *pieces, b"\x32abc") == {}
    assert found.relay.take_inner() == [b"\x31abc", inner, b"\x32abc"]
    assert found.relay.take_inner() == []
    assert found.dropped == {"plain_relay": 1}


def test_what_does_not_fit_a_session_is_cut_for_it() -> None:
    found = lab()
    message = b"\x30" + payload_of(1200)
    pieces = found.relay.fit(found.clients["home"], [message, b"\x31"])
    assert [len(piece) for piece in pieces] == [1170, 41, 1]


# Malformed.


@pytest.mark.parametrize(
    "message",
    [
        b"\x20",
        b"\x20\x00\x01",
        b"\x20\x00\x01" + OUT[:19],
        b"\x20\x00\x01" + OUT6[:39],
        b"\x20\x00\x01\x55" + OUT[1:],
        b"\x22\x00\x01\x00\x00\x80\x00\x00\x01",
        b"\x21",
        b"\x21\x00\x01\x00\x09" + OUT,
        b"\x21\x00\x01\x00\x04" + OUT[:4],
        b"\x2f\x00" + OUT,
        b"\x2f\x03web" + OUT[:8],
        b"\x23\x00",
        OUT[:19],
    ],
)
def test_malformed(message: bytes) -> None:
    found = lab()
    assert found.send("laptop", message, short(WEB, OUT)) == {"home": [short(WEB, OUT)]}
    assert found.dropped == {"malformed": 1}


@pytest.mark.parametrize("message", [b"", b"\x24abc", b"\x33abc", b"\x80abc"])
def test_unknown_messages(message: bytes) -> None:
    found = lab()
    assert found.send("laptop", message) == {}
    assert found.dropped == {"unknown_message": 1}


def test_what_was_judged_for_one_form_of_header_does_not_hold_for_another() -> None:
    """Bytes that would be IPv6 addresses, in a packet that says it is something else."""
    found = lab()
    wrong = b"\x50" + OUT6[1:]
    cut = b"\x60" + bytes(7) + LAPTOP + WEB_IP
    for batch in ([OUT6, wrong], [OUT, cut], [cut, OUT], [wrong, OUT6]):
        good = next(packet for packet in batch if packet in (OUT, OUT6))
        assert found.send("laptop", *[short(WEB, packet) for packet in batch]) == {
            "home": [short(WEB, good)]
        }
    assert found.dropped == {"malformed": 4}


def test_malformed_slices_for_a_seed_connector_are_counted() -> None:
    found = lab(seed=True)
    message = b"\x22\x00\x01\x00\x00\x80\x00\x00\x09" + OUT[:20] + bytes(3)
    assert found.send("laptop", message) == {}
    assert found.dropped == {"malformed": 1}


def some_message() -> st.SearchStrategy[bytes]:
    heads = st.sampled_from(
        [
            b"",
            b"\x20\x00\x01",
            b"\x20\x00\x02",
            b"\x21\x00\x01\x00\x20",
            b"\x22\x00\x01\x00\x00\x00\x00\x00\x10",
            b"\x23\x00\x01\x00\x02",
            b"\x23\x00\x01\x01\x02",
            b"\x2f\x03web",
            b"\x45",
            b"\x60",
        ]
    )
    addressed = st.sampled_from([OUT, OUT6, BACK, udp(LAPTOP, SSH_IP), udp(PHONE, WEB_IP)])
    tail = (
        st.binary(max_size=60)
        | addressed
        | st.tuples(addressed, st.integers(0, 50)).map(lambda pair: pair[0][: pair[1]])
    )
    return st.tuples(heads, tail).map(b"".join)


@given(
    st.lists(st.tuples(st.sampled_from(["laptop", "home"]), some_message()), max_size=20),
    st.booleans(),
)
def test_garbage_changes_nothing_for_another(arrivals: list[tuple[str, bytes]], seed: bool) -> None:
    found = lab(seed=seed)
    form = (lambda packet: packet) if seed else (lambda packet: short(WEB, packet))
    out, back = udp(PHONE, WEB_IP, b"secret"), udp(WEB_IP, PHONE, b"answer")
    half, *rest = fragment(short(WEB, out), 1, 30)
    found.send("phone", half)
    for number, (sender, message) in enumerate(arrivals):
        outgoing = found.send(sender, message, message, now=number / 100)
        assert set(outgoing) <= ({"home", "laptop"} if sender == "laptop" else {"laptop"})
        assert all(len(m) <= 1170 for batch in outgoing.values() for m in batch)
    assert found.send("phone", *rest) == {"home": [form(out)]}
    assert found.send("home", form(back)) == {"phone": [short(WEB, back)]}
