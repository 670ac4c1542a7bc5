"""Where the status socket of a node of this machine is, by its file or by what runs here."""

from collections.abc import Sequence
from pathlib import Path

from ztna.config.load import load_config
from ztna.config.model import (
    AgentConfig,
    AnyConfig,
    ConnectorConfig,
    IntermediateConfig,
    default_file,
    default_state_dir,
)
from ztna.core.identity import Role
from ztna.errors import ConfigError
from ztna.roles.local import RUNTIME_FOLDER, socket_path

_CLASSES: dict[Role, type[AnyConfig]] = {
    Role.AGENT: AgentConfig,
    Role.CONNECTOR: ConnectorConfig,
    Role.INTERMEDIATE: IntermediateConfig,
}


def find_socket(config: Path | None, roles: Sequence[Role]) -> Path:
    """Of the node whose file this is; without a file, of the first of these roles that has a
    socket here. Raises ConfigError for a file that none of the roles can have."""
    if config is not None:
        return _by_file(config, roles)
    found = [_by_default(role) for role in roles]
    return next((each for each in found if _is_there(each)), found[0])


def _by_file(file: Path, roles: Sequence[Role]) -> Path:
    errors: list[ConfigError] = []
    for role in roles:
        try:
            return _of(role, load_config(_CLASSES[role], file, []))
        except ConfigError as error:
            errors.append(error)
    # A file with keys of another role is most likely that role's.
    raise next((each for each in errors if "unknown key" not in str(each)), errors[0])


def _by_default(role: Role) -> Path:
    """As its usual file says, else where it would be without one."""
    try:
        own = _of(role, load_config(_CLASSES[role], default_file(role), []))
    except ConfigError:
        own = socket_path(role, default_state_dir())
    # A node that systemd runs has its state, but not its socket, where its unit says.
    return own if _is_there(own) else RUNTIME_FOLDER / own.name


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:  # then it is there for others, and asking it says so
        return True


def _of(role: Role, config: AnyConfig) -> Path:
    given = config.status_socket if isinstance(config, AgentConfig) else None
    return given or socket_path(role, config.state_dir)
