"""The intermediate judges all clients again, after its files were read anew.

Certificates first: a session, or a TLS stream below one, whose certificate is now denied, expired
or of a CA that is no longer trusted closes. Then rights: services that the policy no longer grants
are withdrawn, and the client is told (0x13 and `Denied`); those that it was refused before and may
now have, it gets. Peer sessions end with the rights to them. All happens between two packets, and a
client whose rights are the same notices nothing.
"""

import functools

import structlog
import trio

from ztna.config.model import IntermediateConfig
from ztna.core import wire
from ztna.core.messages import Denied, encode_message
from ztna.core.policy import Policy
from ztna.core.registry import Registration
from ztna.core.wire import Refusal, ServiceMessage
from ztna.net.closing import CloseCode
from ztna.net.endpoint import Endpoint
from ztna.net.tls import PeerSide, VerifiedPeer
from ztna.roles.judged_sessions import refusal_of
from ztna.roles.reload import NodeFiles, warn_of_restart
from ztna.roles.served import Intermediate, Served, send_policy, send_service_map
from ztna.roles.signed_policy import SignedPolicy

log = structlog.get_logger(__name__)

# Keys of the configuration that a reload brings into force.
RELOADED = frozenset({"identity", "policy", "policy_file", "policy_key", "deny_list"})


def policy_of(files: NodeFiles[IntermediateConfig]) -> Policy:
    """The plain policy that an intermediate's file holds."""
    return Policy.of(files.credentials.identity.trust_domain, files.config.policy)


def apply_policy(
    intermediate: Intermediate, nursery: trio.Nursery, files: NodeFiles[IntermediateConfig]
) -> None:
    """Decide by the policy that the files hold. Raises RemoteProtocolError for a signed one that is
    not good, such as one that is older than that in force, and changes nothing."""
    if files.policy is None or files.policy_keys is None:
        intermediate.policy = None
        intermediate.registry.policy = policy_of(files)
        return
    if intermediate.policy is not None:
        intermediate.policy.take_untrusted(files.policy, files.policy_keys)
        return
    policy = SignedPolicy(files.credentials.identity.trust_domain, files.policy_keys)
    policy.take_untrusted(files.policy)
    policy.subscribe(functools.partial(judge_all, intermediate))
    nursery.start_soon(policy.run)
    intermediate.policy = intermediate.registry.policy = policy


def judge_all(intermediate: Intermediate) -> None:
    """Another policy is in force, or none any more: tell all clients, and judge their services and
    their peer sessions."""
    for served in list(intermediate.served.values()):
        send_policy(intermediate, served)
        _judge_services(intermediate, served)
    intermediate.rendezvous.reconcile_all(trio.current_time())
    intermediate.introduce()


def apply_files(
    intermediate: Intermediate,
    endpoint: Endpoint,
    nursery: trio.Nursery,
    old: NodeFiles[IntermediateConfig],
    new: NodeFiles[IntermediateConfig],
) -> None:
    """Bring what a reload has read into force, for all who are connected and all who come."""
    apply_policy(intermediate, nursery, new)
    warn_of_restart(old, new, RELOADED)
    endpoint.credentials = new.credentials
    intermediate.denied_serials = new.denied_serials

    def refusal(peer: VerifiedPeer) -> str | None:
        return refusal_of(peer, new.credentials, new.denied_serials, PeerSide.CLIENT)

    for served in list(intermediate.served.values()):
        if (reason := refusal(served.session.peer)) is not None:
            _expel(intermediate, served, reason)
    for parted in intermediate.rendezvous.parted.sessions:
        assert isinstance(parted.verified, VerifiedPeer)
        if (reason := refusal(parted.verified)) is not None:
            agent, connector = map(str, parted.ends)
            log.warning(
                "direct session ended by a reload", agent=agent, connector=connector, why=reason
            )
            intermediate.rendezvous.refuse(parted, reason)
    judge_all(intermediate)
    # A stream need not have a session, and a client that lost its right could hold it open.
    for stream in [] if intermediate.streams is None else intermediate.streams.streams():
        if (reason := refusal(stream.peer)) is not None:
            log.warning("TLS stream ended by a reload", client=str(stream), reason=reason)
            nursery.start_soon(stream.dismiss, reason)


def _expel(intermediate: Intermediate, served: Served, reason: str) -> None:
    client = served.client
    log.warning("session ended by a reload", client=str(client.identity), reason=reason)
    # Its packets end here and now; the session itself with the next round of its pump.
    intermediate.registry.remove(client)
    intermediate.relay.remove(client)
    intermediate.rendezvous.gone(client, trio.current_time(), withdrawn=True)
    intermediate.served.pop(client.key, None)
    served.session.close(CloseCode.EXPIRED, reason)


def _judge_services(intermediate: Intermediate, served: Served) -> None:
    client, registry = served.client, intermediate.registry
    held = [*client.routes, *client.provides]
    asked_in_vain = sorted(served.unauthorised.difference(held))
    lost = [a for a in (registry.register(client, i) for i in held) if a.refusal is not None]
    gained = [a for a in (registry.register(client, i) for i in asked_in_vain) if a.refusal is None]
    if not lost and not gained:
        return
    served.unauthorised.difference_update(answer.service_id for answer in gained)
    served.unauthorised.update(
        answer.service_id for answer in lost if answer.refusal is Refusal.NOT_AUTHORISED
    )
    who = str(client.identity)
    for answer in lost:
        log.warning("right withdrawn", client=who, service=answer.service_id, reason=answer.reason)
        if client.speaks_control:
            served.session.send_control(encode_message(Denied(answer.service_id, answer.reason)))
    for answer in gained:
        log.info("right granted", client=who, service=answer.service_id, rule=answer.reason)
    served.session.send_datagrams([_dialogue(answer) for answer in (*lost, *gained)])
    if client.speaks_control:
        send_service_map(served)


def _dialogue(answer: Registration) -> bytes:
    kind = wire.REGISTERED if answer.refusal is None else wire.REFUSED
    message = ServiceMessage(kind, answer.service_id, answer.refusal or 0)
    return wire.encode_service_message(message)
