"""Targets that punch holes: checks and messages of a hostile peer."""

import itertools
import random
from typing import cast

from scripts.fuzzing.examples import CLIENT, ICE_MESSAGES
from scripts.fuzzing.tables import Parser
from ztna.core import messages
from ztna.core.ice.agent import IceAgent
from ztna.core.ice.checklist import MAX_PAIRS
from ztna.core.ice.messages import IceMessage, StartPunching
from ztna.core.ice.owner import stun_owner_untrusted
from ztna.core.ice.paths import MAX_PATHS
from ztna.core.ice.plan import NatView
from ztna.core.ice.punching import Gathered
from ztna.core.natclass import NatBehaviour, Presence
from ztna.core.ports import UdpPort
from ztna.core.stun import attributes as stun
from ztna.core.stun.messages import (
    MessageClass,
    StunMessage,
    build_stun_message,
    parse_stun_untrusted,
)
from ztna.roles.gathering import Gatherer, Question

_SIGNATURES = {
    stun.Username.kind,
    stun.MessageIntegrity.kind,
    stun.MessageIntegritySha256.kind,
    stun.Fingerprint.kind,
}


def _agent(*, controlling: bool) -> IceAgent:
    """One that checks: its peer has said what `examples` has."""
    agent = IceAgent(controlling, random.Random(3), peer_hosts=frozenset({CLIENT[0]}))
    nat = NatView(NatBehaviour(Presence.OPEN))
    agent.start(0.0)
    for message in ICE_MESSAGES[:3]:
        agent.receive_message(message, 0.0)
        agent.gathered(Gathered((), nat, {0: {4}, 1: {6}}, frozenset({"203.0.113.10"})), 0.0)
    agent.handle_timer(1.0)
    return agent


def ice_checks() -> Parser:
    """Messages that are signed as the peer's would be, whatever they say; the controlling agent and
    the controlled one have them in turn."""
    agents = itertools.cycle([_agent(controlling=controlling) for controlling in (True, False)])
    times = itertools.count()

    def parse(data: bytes) -> None:
        agent, now = next(agents), 1 + next(times) * 0.01
        assert agent.punching is not None
        keys = agent.punching.keys
        stun_owner_untrusted(data)
        sent = agent.packets_to_send(now)
        agent.receive_packet_untrusted(data, 0, CLIENT, now)
        message = parse_stun_untrusted(data)
        answer = message.message_class is not MessageClass.REQUEST
        given = [a for a in message.attributes if a.kind not in _SIGNATURES]
        name = stun.Username(f"{keys.own.ufrag}:{keys.peer.ufrag}")
        asked = [each for each in sent if each.batch.data[:2] == b"\0\1"]
        number = bytes(asked[0].batch.data[8:20]) if asked and answer else data[8:20]
        signed = StunMessage(message.message_class, number, (name, *given), message.method)
        key = (keys.peer if answer else keys.own).password.encode()
        source = asked[0].batch.address if asked and answer else CLIENT
        agent.receive_packet_untrusted(build_stun_message(signed, key), 0, source, now)
        agent.handle_timer(now)
        while agent.next_event() is not None:
            pass
        assert len(agent.punching.pairs) <= MAX_PAIRS
        assert agent.statistics()["paths"] <= MAX_PATHS

    return parse


def ice_messages() -> Parser:
    def parse(data: bytes) -> None:
        message = messages.parse_message_untrusted(data)
        if isinstance(message, IceMessage):
            agent = _agent(controlling=len(data) % 2 == 0)
            agent.receive_message(message, 40.0)
            agent.gathered(Gathered((), NatView(NatBehaviour(Presence.OPEN)), {0: {4}}), 40.0)
            agent.receive_message(StartPunching(message.generation), 40.0)
            for now in (41.0, 43.0, 60.0):
                agent.handle_timer(now)
                agent.packets_to_send(now)
            for said in agent.messages_to_send(60.0):
                messages.encode_message(said)

    return parse


def gatherer() -> Parser:
    """Answers to a question of ours, whatever they say."""
    number = bytes(12)
    found = Gatherer(cast(UdpPort, None), server=CLIENT)

    def parse(data: bytes) -> None:
        found._asked[number] = Question(CLIENT)
        found.receive_response_untrusted(data[:8] + number + data[20:], number, CLIENT)

    return parse
