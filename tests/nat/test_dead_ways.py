"""A direct way that leads to nobody, or to another machine than the session's."""

from typing import Any

import pytest
import structlog.testing
import trio
from trio.testing import MockClock

from tests.nat.test_direct import Lines
from tests.nat.test_roles import BACKEND, Deployment, deployed, echo
from tests.net.certificates import make_agent
from tests.roles.memory import ECHO_IP, AgentHost
from tests.roles.user_host import UserHost, echo_request
from ztna.config.model import AgentService, ConnectorService
from ztna.nat.spec import PORT_RESTRICTED


async def one(agent: AgentHost, **request: object) -> dict[str, Any]:
    (answer,) = await agent.ask(**request)
    return answer


async def is_told_at_once(user: UserHost) -> None:
    """Its packets are answered: host unreachable, by the service's address."""
    user.packets.clear()
    for _ in range(3):
        user.send(echo_request(user.address(ECHO_IP), ECHO_IP.packed))
        with trio.fail_after(0.01):
            (answer,) = await user.take()
        assert (answer[12:16], answer[20:22]) == (ECHO_IP.packed, b"\x03\x01")


@pytest.mark.parametrize("direct", [True, False])
async def test_connector_is_killed(direct: bool, autojump_clock: MockClock) -> None:
    """The intermediate misses it after 30 s and says so: from then on nobody waits for it, although
    the session with it would be given up only after 120 s; and it is told, with its name."""
    async with deployed(PORT_RESTRICTED, PORT_RESTRICTED) as it:
        it.world.direct = direct
        agent = await it.start()
        with trio.fail_after(400):
            async with UserHost.open(agent) as user:
                await echo(user, b"at once")
                await trio.sleep(10)
                (peer,) = (await one(agent, ask="paths"))["peers"]
                assert peer["selected"]["kind"] == ("direct" if direct else "relay")
                await it.world.kill("home")
                await trio.sleep(40)
                for _ in range(2):
                    await is_told_at_once(user)
                    (peer,) = (await one(agent, ask="paths"))["peers"]
                    assert (peer["up"], peer["selected"]["kind"]) == (False, "none")
                    assert "no path: " in peer["failure"]
                    assert "100::" not in peer["failure"]
                    assert len(set(words := peer["failure"].split("; "))) == len(words)
                    answer = await one(agent, ask="why", service="echo")
                    assert answer["broken"] == "connector"
                    assert answer["found"] == "no connector is registered for echo"
                    assert "start the connector of echo" in answer["todo"]
                    await trio.sleep(120)
                await it.world.start_connector([ConnectorService("echo", BACKEND, ECHO_IP)])
                await echo(user, b"again")


async def test_connector_loses_the_intermediate_alone(autojump_clock: MockClock) -> None:
    """What is direct goes on, though the intermediate says that nobody provides it any more."""
    async with deployed(PORT_RESTRICTED, PORT_RESTRICTED) as it:
        it.world.direct = True
        agent = await it.start()
        with trio.fail_after(400):
            async with UserHost.open(agent) as user:
                await echo(user, b"at once")
                await trio.sleep(10)
                it.connector_nat.outside.block(it.world.relay_host.address)
                await trio.sleep(60)
                (peer,) = (await one(agent, ask="paths"))["peers"]
                assert (peer["up"], peer["selected"]["kind"]) == (True, "direct")
                await echo(user, b"alone")
                answer = await one(agent, ask="why", service="echo")
                assert answer["works"], answer


async def second_machine(it: Deployment) -> AgentHost:
    """Another one with the identity of the first, elsewhere."""
    it.world.hosts["second"] = it.lab.host("198.51.100.77")
    credentials = make_agent(it.world.deployment.ca, it.world.deployment.now, "laptop")
    wanted = [AgentService("echo", ECHO_IP)]
    return await it.world.start_agent(wanted, "second", credentials=credentials)


async def test_two_machines_with_one_identity(autojump_clock: MockClock) -> None:
    """The newer one is answered where it is, although the older one's direct path still works;
    the older one says what is wrong."""
    with structlog.testing.capture_logs() as entries:
        async with deployed(PORT_RESTRICTED, PORT_RESTRICTED) as it:
            it.world.direct = True
            first = await it.start()
            with trio.fail_after(60):
                async with UserHost.open(first) as user:
                    await echo(user, b"at once")
                    await Lines(entries).until("DIRECT")
                    second = await second_machine(it)
                    async with UserHost.open(second) as other:
                        with trio.fail_after(3):
                            await echo(other, b"here, too")
                    answer = await one(first, ask="why", service="echo")
    stage = next(each for each in answer["stages"] if each["name"] == "intermediate")
    assert "another machine uses the identity agent/laptop" in stage["found"]
    assert "its own certificate" in stage["todo"]
    assert "client refused" not in {each["event"] for each in entries}
