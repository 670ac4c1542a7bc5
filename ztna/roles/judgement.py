"""The intermediate judges all clients again, after its files were read anew.

Certificates first: a session whose certificate is now denied, expired or of a CA that is no longer
trusted closes. Then rights: services that the policy no longer grants are withdrawn, and the client
is told (0x13 and `Denied`); those that it was refused before and may now have, it gets. All happens
between two packets, and a client whose rights are the same notices nothing.
"""

import datetime

import structlog

from ztna.config.model import IntermediateConfig
from ztna.core import wire
from ztna.core.messages import Denied, encode_message
from ztna.core.policy import Policy
from ztna.core.registry import Registration
from ztna.core.wire import Refusal, ServiceMessage
from ztna.net.closing import CloseCode
from ztna.net.endpoint import Endpoint
from ztna.net.tls import PeerRefusedError, PeerSide, judge_again
from ztna.roles.reload import NodeFiles, warn_of_restart
from ztna.roles.served import Intermediate, Served, send_service_map

log = structlog.get_logger(__name__)

# Keys of the configuration that a reload brings into force.
RELOADED = frozenset({"identity", "policy", "deny_list"})


def policy_of(files: NodeFiles[IntermediateConfig]) -> Policy:
    """The policy that an intermediate's files hold."""
    return Policy.of(files.credentials.identity.trust_domain, files.config.policy)


def apply_files(
    intermediate: Intermediate,
    endpoint: Endpoint,
    old: NodeFiles[IntermediateConfig],
    new: NodeFiles[IntermediateConfig],
) -> None:
    """Bring what a reload has read into force, for all who are connected and all who come."""
    warn_of_restart(old.config, new.config, RELOADED)
    endpoint.credentials = new.credentials
    intermediate.denied_serials = new.denied_serials
    intermediate.registry.policy = policy_of(new)
    now = datetime.datetime.now(datetime.UTC)
    for served in list(intermediate.served.values()):
        try:
            judge_again(
                served.session.peer,
                new.credentials,
                side=PeerSide.CLIENT,
                now=now,
                denied_serials=new.denied_serials,
            )
        except PeerRefusedError as error:
            _expel(intermediate, served, str(error))
        else:
            _judge_services(intermediate, served)


def _expel(intermediate: Intermediate, served: Served, reason: str) -> None:
    client = served.client
    log.warning("session ended by a reload", client=str(client.identity), reason=reason)
    # Its packets end here and now; the session itself with the next round of its pump.
    intermediate.registry.remove(client)
    intermediate.relay.remove(client)
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
