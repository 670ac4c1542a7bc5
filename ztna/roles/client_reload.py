"""What a reload changes at a client, agent or connector alike.

Services come and go within the running session. Another certificate begins another session beside
it, which replaces it. A server whose certificate is no longer good is left at once.
"""

import datetime

import attrs
import structlog

from ztna.config.model import AgentConfig, ConnectorConfig
from ztna.net.closing import CloseCode
from ztna.net.tls import PeerRefusedError, PeerSide, judge_again
from ztna.roles.control_client import ControlLink
from ztna.roles.control_keeper import ControlKeeper
from ztna.roles.reload import NodeFiles, warn_of_restart

log = structlog.get_logger(__name__)

ClientFiles = NodeFiles[AgentConfig] | NodeFiles[ConnectorConfig]
# Keys of the configuration that a reload brings into force.
RELOADED = frozenset({"identity", "services", "deny_list"})


def apply_to_session(
    keeper: ControlKeeper, link: ControlLink | None, old: ClientFiles, new: ClientFiles
) -> None:
    """Bring certificates and deny-list into force for this session and the next ones.

    link: the session, if it is up.
    """
    keeper.credentials = new.credentials
    keeper.denied_serials = new.denied_serials
    reloaded = RELOADED
    if keeper.policy is not None and new.policy_keys is not None:
        keeper.policy.set_keys(new.policy_keys)
        reloaded |= {"policy_key"}
    warn_of_restart(old.config, new.config, reloaded)
    if link is None:
        return
    try:
        judge_again(
            link.session.peer,
            new.credentials,
            side=PeerSide.SERVER,
            now=datetime.datetime.now(datetime.UTC),
            denied_serials=new.denied_serials,
        )
    except PeerRefusedError as error:
        log.warning("session ended by a reload", reason=str(error))
        link.session.close(CloseCode.EXPIRED, str(error))
        return
    if new.credentials.certificate != old.credentials.certificate:
        keeper.renew()


def changed_services(old: ClientFiles, new: ClientFiles) -> dict[str, str]:
    """What became of each service that is not as it was: "added", "removed" or "changed"."""
    was = {service.id: attrs.astuple(service) for service in old.config.services}
    now = {service.id: attrs.astuple(service) for service in new.config.services}
    changes = {i: "changed" if i in was else "added" for i in now if was.get(i) != now[i]}
    return changes | dict.fromkeys(was.keys() - now.keys(), "removed")
