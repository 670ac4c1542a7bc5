"""What `ztna why`, `ping` and `paths` say of direct paths behind NATs, in memory."""

from typing import Any

import trio
from trio.testing import MockClock

from tests.nat.test_roles import deployed
from tests.roles.memory import AgentHost
from ztna.nat.spec import PORT_RESTRICTED, SYMMETRIC


async def one(agent: AgentHost, **request: object) -> dict[str, Any]:
    (answer,) = await agent.ask(**request)
    return answer


async def test_both_sides_symmetric(autojump_clock: MockClock) -> None:
    """It works, by the relay: both NATs are named, every pair has its reason, and what would
    change it is told."""
    async with deployed(SYMMETRIC, SYMMETRIC) as it:
        it.world.direct = True
        it.world.other_relay_host = it.lab.host("198.51.100.11")
        agent = await it.start()
        with trio.fail_after(120):
            await trio.sleep(1)
            answer = await one(agent, ask="why", service="echo")
            assert "the NAT here is still being probed" in answer["path"]["why"]
            await trio.sleep(25)
            answer = await one(agent, ask="why", service="echo")
            *echoes, summary = await agent.ask(
                ask="ping", service="echo", interval=0.05, count=3, until_direct=True
            )
        assert [each["path"] for each in echoes] == ["relay"] * 3
        assert (summary["answered"], summary["direct"], summary["exit_code"]) == (3, False, 13)
        path = answer["path"]
        assert (answer["works"], path["way"]["kind"], path["direct"]) == (True, "relay", False)
        assert path["nat_here"] == path["nat_there"] == "symmetric NAT"
        assert "each uses another port for each destination" in path["why"]
        assert "mapped port (PCP, NAT-PMP, UPnP) or IPv6 here" in path["would_change"]
        assert path["pairs"]
        for pair in [*path["pairs"], *path["peer_pairs"]]:
            assert pair["state"] != "succeeded"
            assert pair["reason"], pair


async def test_ping_until_direct(autojump_clock: MockClock) -> None:
    """The first answers come by the relay, the last one directly; then why has no more to say."""
    async with deployed(PORT_RESTRICTED, PORT_RESTRICTED) as it:
        it.world.direct = True
        agent = await it.start()
        with trio.fail_after(120):
            *echoes, summary = await agent.ask(
                ask="ping", service="echo", interval=0.05, count=600, until_direct=True
            )
            kinds = [each["path"] for each in echoes if each["rtt"] is not None]
            assert kinds[-1] == "direct"
            assert kinds.count("direct") == 1
            assert set(kinds) <= {"relay", "direct"}
            assert (summary["direct"], summary["exit_code"]) == (True, 0)
            assert echoes[-1]["words"].startswith("DIRECT (peer: ")
            await trio.sleep(1)
            answer = await one(agent, ask="why", service="echo")
            assert answer["path"]["direct"]
            assert answer["path"]["why"] == answer["path"]["would_change"] == ""
            (status,) = await agent.ask(ask="status")
            row = status["services"][0]
            assert (row["path"]["kind"], row["proof_path"]) == ("direct", "direct")


async def test_paths_as_they_change(autojump_clock: MockClock) -> None:
    async with deployed(PORT_RESTRICTED, PORT_RESTRICTED) as it:
        it.world.direct = True
        agent = await it.start()
        await agent.served.wait()
        assert agent.answer is not None
        seen: list[tuple[str, list[str]]] = []

        async def send(fields: Any) -> None:
            await trio.lowlevel.checkpoint()
            for peer in fields["peers"]:
                kinds = [path["kind"] for path in peer["paths"] if path["selected"]]
                seen.append((peer["selected"]["kind"], kinds))

        with trio.move_on_after(40):
            await agent.answer({"ask": "paths", "watch": True}, send)
        assert ("relay", ["relay"]) in seen
        assert seen[-1] == ("direct", ["direct"])


async def test_switched_off(autojump_clock: MockClock) -> None:
    async with deployed(PORT_RESTRICTED, PORT_RESTRICTED) as it:
        agent = await it.start()
        with trio.fail_after(60):
            await trio.sleep(5)
            answer = await one(agent, ask="why", service="echo")
        assert "switched off" in answer["path"]["why"]
