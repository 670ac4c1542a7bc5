"""The intermediate answers STUN beside its sessions, and counts it."""

import trio
from trio.testing import MockClock

from tests.roles.memory import RELAY, open_world
from ztna.core.ports import UdpBatch
from ztna.core.stun.attributes import XorMappedAddress
from ztna.core.stun.messages import (
    MessageClass,
    StunMessage,
    build_stun_message,
    parse_stun_untrusted,
)
from ztna.roles.tree import statistics_registry


async def test_stun_on_the_quic_port(autojump_clock: MockClock) -> None:
    async with open_world([]) as world:
        await world.start_intermediate()
        async with world.network.host("192.0.2.77").open_udp_port() as port:
            request = StunMessage(MessageClass.REQUEST, b"t" * 12, ())
            data = build_stun_message(request)
            await port.send([UdpBatch(data, len(data), (RELAY, 4433))])
            with trio.fail_after(1):
                (batch,) = await port.receive()
            answer = parse_stun_untrusted(batch.data)
            assert answer.find(XorMappedAddress) == XorMappedAddress(port.local_address)
        found = statistics_registry().read()["stun"]
        assert found == {"answered": 1, "not_stun": 0, "send_full": 0, "ports": 2}
