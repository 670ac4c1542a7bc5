"""What tests with a signed policy share: a key, documents, and a deployment that runs by one."""

import datetime
import json
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric import ed25519

from tests.roles.memory import ECHO_IP, WEB_IP, AgentHost, World
from ztna.config.model import AgentService, ConnectorService
from ztna.core.policy_document import SignedDocument, format_time
from ztna.policy_key import PolicyKeys, sign_policy
from ztna.roles.signed_policy import PolicyStore, SignedPolicy, utc_now

Clock = Callable[[], datetime.datetime]

KEY = ed25519.Ed25519PrivateKey.generate()
OTHER_KEY = ed25519.Ed25519PrivateKey.generate()
KEYS = PolicyKeys((KEY.public_key(),))
ECHO_BACKEND, WEB_BACKEND = ("10.2.0.20", 9999), ("10.2.0.21", 80)
LAPTOP = {"who": "agent/laptop", "services": ["echo"]}
PHONE = {"who": "agent/phone", "services": ["echo", "web"]}
HOME = {"who": "connector/home", "provides": ["*"]}
SERVICES = [
    {"id": "echo", "virtual_ip": str(ECHO_IP), "protocol": "udp", "port": 9999},
    {"id": "web", "virtual_ip": str(WEB_IP), "protocol": "tcp", "port": 80},
]


def signed(
    serial: int, *rules: object, key: ed25519.Ed25519PrivateKey = KEY, **changes: object
) -> SignedDocument:
    """A signed document that is good from a day ago for a month."""
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    fields = {
        "version": 1,
        "trust_domain": "example.net",
        "serial": serial,
        "issued": format_time(now - day),
        "expires": format_time(now + 30 * day),
        "services": SERVICES,
        "rules": list(rules),
        **changes,
    }
    return sign_policy(key, json.dumps(fields).encode())


def make_policy(store: PolicyStore | None = None, clock: Clock = utc_now) -> SignedPolicy:
    """The holder of a client that has pinned the key."""
    if store is None:
        return SignedPolicy("example.net", KEYS, clock=clock)
    return SignedPolicy.load("example.net", KEYS, store)


async def start_all(
    world: World, first: SignedDocument, clock: Clock = utc_now
) -> tuple[AgentHost, AgentHost]:
    """A deployment by this policy: intermediate, connector, laptop and phone. Only the policy knows
    addresses, ports and protocols."""
    world.dialer.datagrams[ECHO_BACKEND] = lambda datagram: [datagram]
    world.signed, world.policy_keys = first, KEYS
    await world.start_intermediate()
    await world.start_connector(
        [ConnectorService("echo", ECHO_BACKEND), ConnectorService("web", WEB_BACKEND)],
        policy=make_policy(clock=clock),
    )
    laptop = await world.start_agent([AgentService("echo")], policy=make_policy(clock=clock))
    # It names no service, and gets what the policy gives it.
    phone = await world.start_agent([], "phone", "203.0.113.2", policy=make_policy(clock=clock))
    return laptop, phone
