"""What a reload changes at a client, agent or connector alike.

Services come and go within the running session. Another certificate begins another session beside
it, which replaces it. A server whose certificate is no longer good is left at once.
"""

import attrs

from ztna.config.model import AgentConfig, ConnectorConfig
from ztna.net.tls import PeerSide
from ztna.roles.control_keeper import ControlKeeper
from ztna.roles.judged_sessions import judge_session
from ztna.roles.reload import NodeFiles, warn_of_restart

ClientFiles = NodeFiles[AgentConfig] | NodeFiles[ConnectorConfig]
# Keys of the configuration that a reload brings into force.
RELOADED = frozenset({"identity", "services", "deny_list"})


def apply_to_session(keeper: ControlKeeper, old: ClientFiles, new: ClientFiles) -> None:
    """Bring certificates and deny-list into force for the control session and the next ones."""
    keeper.credentials = new.credentials
    keeper.denied_serials = new.denied_serials
    reloaded = RELOADED
    if keeper.policy is not None and new.policy_keys is not None:
        keeper.policy.set_keys(new.policy_keys)
        reloaded |= {"policy_key"}
    warn_of_restart(old, new, reloaded)
    session = keeper.session
    if session is not None and not judge_session(
        session, new.credentials, new.denied_serials, PeerSide.SERVER
    ):
        return
    if new.credentials.certificate != old.credentials.certificate:
        keeper.renew()


def changed_services(old: ClientFiles, new: ClientFiles) -> dict[str, str]:
    """What became of each service that is not as it was: "added", "removed" or "changed"."""
    was = {service.id: attrs.astuple(service) for service in old.config.services}
    now = {service.id: attrs.astuple(service) for service in new.config.services}
    changes = {i: "changed" if i in was else "added" for i in now if was.get(i) != now[i]}
    return changes | dict.fromkeys(was.keys() - now.keys(), "removed")
