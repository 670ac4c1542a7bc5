"""Where the status socket of a node of this machine is, by its file or by what runs here."""

import os
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
from ztna.roles.local import RUNTIME_FOLDER, is_answered, socket_path

_CLASSES: dict[Role, type[AnyConfig]] = {
    Role.AGENT: AgentConfig,
    Role.CONNECTOR: ConnectorConfig,
    Role.INTERMEDIATE: IntermediateConfig,
}


def find_socket(config: Path | None, roles: Sequence[Role]) -> Path:
    """Of the node whose file this is; without a file, of the first of these roles that runs here.
    Raises ConfigError for a file that none of the roles can have."""
    if config is not None:
        return _by_file(config, roles)
    found = [_by_default(role) for role in roles]
    return next((each for each in found if is_answered(each)), found[0])


def other_role(roles: Sequence[Role]) -> Role | None:
    """A node that runs here and is none of these."""
    others = (role for role in Role if role not in roles)
    return next((role for role in others if is_answered(_by_default(role))), None)


def _by_file(file: Path, roles: Sequence[Role]) -> Path:
    errors: list[ConfigError] = []
    for role in roles:
        try:
            own = _of(role, _read(role, file))
        except ConfigError as error:
            errors.append(error)
            continue
        usual = os.path.realpath(file) == os.path.realpath(default_file(role))
        return _of_unit(own) if usual else own
    # A file with keys of another role is most likely that role's.
    raise next((each for each in errors if "unknown key" not in str(each)), errors[0])


def _by_default(role: Role) -> Path:
    """As its usual file says, else where it would be without one."""
    try:
        own = _of(role, _read(role, default_file(role)))
    except ConfigError:
        own = socket_path(role, default_state_dir())
    return _of_unit(own)


def _read(role: Role, file: Path) -> AnyConfig:
    """Who may ask a node need not have the right to read its key."""
    return load_config(_CLASSES[role], file, [], check_files=False)


def _of_unit(own: Path) -> Path:
    """A node that systemd runs has its state, but not its socket, where its unit says; its file
    tells nothing of that."""
    unit = RUNTIME_FOLDER / own.name
    return own if is_answered(own) or (_is_there(own) and not is_answered(unit)) else unit


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        return True


def _of(role: Role, config: AnyConfig) -> Path:
    given = config.status_socket if isinstance(config, AgentConfig) else None
    return given or socket_path(role, config.state_dir)
