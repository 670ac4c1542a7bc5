"""`ztna why` where no agent answers: what this machine's files say of it, in the same stages."""

import socket
from pathlib import Path

from ztna.config.load import load_config
from ztna.config.model import AgentConfig
from ztna.core.diagnosis import Diagnosis, Stage, StageName, StageState, broken, ok
from ztna.core.identity import Role
from ztna.core.wire import SERVICE_DOMAIN
from ztna.errors import ConfigError, IdentityError
from ztna.pki import load_credentials


def diagnose(service: str, file: Path, nobody: str) -> Diagnosis:
    """The stages up to the agent's. file: the agent's. nobody: that none answers, and where."""
    route = Stage(StageName.ROUTE, StageState.NOT_TRIED, "no agent runs here")
    try:
        config = load_config(AgentConfig, file, check_files=False)
    except ConfigError as error:
        found = f"{nobody}; it cannot start: {error}"
        todo = "correct the file, or name the agent's own by --config; then start it"
        stage = broken(StageName.AGENT, found, todo)
        return Diagnosis.of(service, [route, stage], ConfigError.exit_code)
    name, certificate = _name(service, config), _certificate(config)
    return Diagnosis.of(service, [name, route, certificate, _agent(config, nobody)])


def _name(service: str, config: AgentConfig) -> Stage:
    name = StageName.NAME
    for each in config.services:
        if service in {each.id, each.id + SERVICE_DOMAIN, str(each.virtual_ip)}:
            return ok(name, f"{each.id} is in the agent's file")
    if config.policy_key is not None and not config.services:
        return Stage(name, StageState.NOT_TOLD, "its services come from the signed policy")
    known = ", ".join(each.id for each in config.services) or "no service"
    return broken(name, f"the agent's file names no service {service!r}", f"it names {known}")


def _certificate(config: AgentConfig) -> Stage:
    name, files = StageName.CERTIFICATE, config.identity
    try:
        credentials = load_credentials(files.cert, files.key, files.ca, role=Role.AGENT)
    except IdentityError as error:
        if isinstance(error.__cause__, PermissionError):  # not the agent's trouble, but ours
            return Stage(name, StageState.NOT_TOLD, f"{error}, for the user who asks")
        todo = "put that right, then start the agent (ztna run agent)"
        return broken(name, f"the agent cannot start with its own certificate: {error}", todo)
    return ok(name, f"valid until {credentials.not_after:%Y-%m-%d %H:%M} UTC")


def _agent(config: AgentConfig, nobody: str) -> Stage:
    name, there = StageName.AGENT, config.intermediate
    try:
        socket.getaddrinfo(there.host, there.port, type=socket.SOCK_DGRAM)
    except OSError as error:
        found = f"{nobody}; it cannot start: the name {there.host!r} does not resolve"
        todo = f"check `intermediate.host` and this machine's DNS ({error.strerror})"
        return broken(name, found, todo)
    return broken(name, nobody, "start it (ztna run agent), and see its last words there")
