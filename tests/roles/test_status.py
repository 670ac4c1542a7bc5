"""What connector and intermediate answer to `ztna status`, in memory."""

import io

import pytest
import trio
from rich.console import Console
from trio.testing import MockClock

from tests.roles.memory import WEB_IP, open_world
from tests.roles.test_why import POLICY, WEB_BACKEND, open_all
from tests.roles.user_host import UserHost, echo_request
from ztna.cli import seen_text
from ztna.errors import UsageError


async def test_connector(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        await open_all(world)
        await trio.sleep(1)
        (status,) = await world.ask("home", ask="status")
        assert (status["role"], status["exit_code"]) == ("connector", 0)
        there = status["intermediate"]
        assert (there["up"], there["state"], there["proof_age"]) == (True, "ok", 0.0)
        assert "round trip 2" in there["found"]
        rows = {row["service"]: row for row in status["services"]}
        assert [(row["state"], row["health"]) for row in rows.values()] == [
            ("registered", "answers"),
            ("registered", "answers"),
        ]
        (peer,) = status["peers"]
        assert (peer["peer"], peer["up"], peer["selected"]["kind"]) == (
            "agent/laptop",
            True,
            "relay",
        )
        assert peer["services"] == ["echo", "web"]
        # Tried now, and not remembered.
        del world.dialer.streams[WEB_BACKEND]
        (status,) = await world.ask("home", ask="status")
        assert [row["health"] for row in status["services"]] == ["answers", "refuses"]
        assert (status["services"][1]["ready"], status["exit_code"]) == (False, 6)
        (paths,) = await world.ask("home", ask="paths")
        assert paths["peers"][0]["paths"][0]["kind"] == "relay"
        await world.kill("intermediate")
        (status,) = await world.ask("home", ask="status")
        assert status["intermediate"]["state"] == "broken"
        assert "does not answer on UDP port 4433" in status["intermediate"]["found"]
        assert status["intermediate"]["proof_age"] is None
        console = Console(file=io.StringIO(), width=300, record=True)
        seen_text.connector(console, status)
        text = console.export_text()
        assert "web: registered: TCP 10.2.0.30:8080: connection refused" in text
        assert "intermediate 198.51.100.10:4433: broken: intermediate unreachable" in text
        with pytest.raises(UsageError, match="not 'why': ask the agent"):
            await world.ask("home", ask="why", service="web")


async def test_paths_of_a_connector_are_watched(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        await open_all(world)
        await trio.sleep(1)
        seen: list[bool] = []

        async def send(fields: object) -> None:
            await trio.lowlevel.checkpoint()
            assert isinstance(fields, dict)
            seen.append(any(peer["up"] for peer in fields["peers"]))

        with trio.move_on_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.answers["home"], {"ask": "paths", "watch": True}, send)
                await trio.sleep(2)
                world.stop("laptop")
        assert (seen[0], seen[-1]) == (True, False)


async def test_intermediate(autojump_clock: MockClock) -> None:
    async with open_world(POLICY) as world:
        agent = await open_all(world)
        await trio.sleep(1)
        async with UserHost.open(agent) as user, trio.open_nursery() as nursery:

            async def traffic() -> None:
                while True:
                    await user.ask(echo_request(user.address(WEB_IP), WEB_IP.packed))

            nursery.start_soon(traffic)
            (status,) = await world.ask("intermediate", ask="status")
            nursery.cancel_scope.cancel()
        assert (status["role"], status["exit_code"]) == ("intermediate", 0)
        sessions = {each["client"]: each for each in status["sessions"]}
        assert sorted(sessions) == ["agent/laptop", "connector/home"]
        for each in sessions.values():
            assert 0.02 <= each["rtt"] < 0.04
            assert each["over"] == "udp"
            assert each["certificate_days"] > 0
        services = {each["service"]: each for each in status["services"]}
        assert services["web"] == {"service": "web", "connectors": ["connector/home"], "agents": 1}
        assert status["relay"]["channels"] == 2
        assert status["relay"]["rates"]["relay_relayed_bytes"] > 100
        await world.kill("laptop")
        (status,) = await world.ask("intermediate", ask="status")
        silent = [each["client"] for each in status["sessions"] if each["rtt"] is None]
        assert silent == ["agent/laptop"]
        console = Console(file=io.StringIO(), width=300, record=True)
        seen_text.intermediate(console, status)
        text = console.export_text()
        assert "web: connector/home; 1 agent may use it" in text
        assert "relay: 2 channels, 1 peer sessions" in text
        with pytest.raises(UsageError, match="an intermediate answers status"):
            await world.ask("intermediate", ask="paths")
