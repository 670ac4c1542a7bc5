"""Read a node's configuration: file, then environment over it, then flags over both.

`load_config` reads the file (`ztna.config.document`), lays the environment's variables and the
caller's overrides over it, builds the class (`ztna.config.structure`), checks what concerns
several keys (`ztna.config.check`), and makes paths absolute. All that is wrong is told at once,
each with file and line, or the variable or flag that it came from.
"""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import attrs

from ztna.config.check import check_config
from ztna.config.document import Document, JsonPath, format_path, read_document
from ztna.config.model import (
    DESCRIBED,
    AnyConfig,
    IdentityFiles,
    IntermediateConfig,
)
from ztna.config.structure import Problem, StructureError, scalar_keys, structure
from ztna.errors import ConfigError

C = TypeVar("C", bound=AnyConfig)


@attrs.frozen
class Override:
    """A value that replaces the file's.

    path: which key; keys and indices around it are made where they are missing.
    source: where it came from, in words such as "option --server"; or the document whose root
    it is.
    """

    path: JsonPath
    value: object
    source: str | Document


def load_config(
    cls: type[C],
    file: Path | None,
    overrides: Sequence[Override] = (),
    environment: Mapping[str, str] | None = None,
    *,
    check_files: bool = True,
) -> C:
    """Read a configuration. Raises ConfigError that tells all that is wrong.

    file: None for none: environment and overrides must then give all that is needed.
    environment: variables; those of the process if None.
    check_files: whether certificate, key and CA must be there.
    """
    document = read_document(file) if file is not None else None
    return build_config(cls, document, overrides, environment, check_files=check_files)


def build_config(
    cls: type[C],
    document: Document | None,
    overrides: Sequence[Override] = (),
    environment: Mapping[str, str] | None = None,
    *,
    check_files: bool = True,
) -> C:
    """As `load_config`, from a document that is already read."""
    variables = os.environ if environment is None else environment
    layered: list[Override] = [*_from_environment(cls, variables), *overrides]
    value: object = {} if document is None else copy.deepcopy(document.value)
    if isinstance(value, dict):
        for override in layered:
            _put(value, override.path, copy.deepcopy(override.value))
    problems = [*_duplicate_keys(document, layered)]
    try:
        config = structure(value, cls, DESCRIBED)
    except StructureError as error:
        problems += error.problems
    else:
        problems += check_config(config)
        config = _with_absolute_paths(config, document, layered)
        if check_files:
            problems += _missing_files(config)
    if problems:
        raise ConfigError(_describe(problems, document, layered))
    return config


def _from_environment(cls: type, environment: Mapping[str, str]) -> Iterator[Override]:
    for scalar in scalar_keys(cls):
        text = environment.get(scalar.variable)
        if text is not None:
            yield Override(
                scalar.path, scalar.from_text(text), f"environment variable {scalar.variable}"
            )


def _duplicate_keys(document: Document | None, overrides: Sequence[Override]) -> Iterator[Problem]:
    sources: list[tuple[JsonPath, str | Document | None]] = [((), document)]
    sources += [(override.path, override.source) for override in overrides]
    for prefix, source in sources:
        if isinstance(source, Document):
            for path, line in source.duplicates:
                text = f"this key stands twice (again in line {line}); keep one"
                yield Problem((*prefix, *path), text)


def _put(value: object, path: JsonPath, new: object) -> None:
    """Set a value deep inside, making objects and list entries on the way. Where the file has
    something else than an object or a list, nothing is set: that is an error told later."""
    step, *rest = path
    if isinstance(step, str) and isinstance(value, dict):
        if rest:
            _put(value.setdefault(step, {}), tuple(rest), new)
        else:
            value[step] = new
    elif isinstance(step, int) and isinstance(value, list):
        value.extend({} for _ in range(step + 1 - len(value)))
        _put(value[step], tuple(rest), new)


def _origin(path: JsonPath, overrides: Sequence[Override]) -> Override | None:
    """The override that a value came from; None for the file."""
    for override in reversed(overrides):
        if path[: len(override.path)] == override.path:
            return override
    return None


def _where(path: JsonPath, document: Document | None, overrides: Sequence[Override]) -> str:
    origin = _origin(path, overrides)
    if origin is None:
        return document.where(path) if document else "no configuration file, no option"
    if isinstance(origin.source, Document):
        return origin.source.where(path[len(origin.path) :])
    return origin.source


def _order(path: JsonPath, document: Document | None, overrides: Sequence[Override]) -> int:
    """What stands in the file first, from the top to the bottom."""
    in_file = document is not None and _origin(path, overrides) is None
    return document.line(path) if document and in_file else 1 << 32


def _describe(
    problems: Sequence[Problem], document: Document | None, overrides: Sequence[Override]
) -> str:
    lines = []
    for problem in sorted(problems, key=lambda problem: _order(problem.path, document, overrides)):
        line = f"{_where(problem.path, document, overrides)}: {format_path(problem.path)}"
        lines.append(f"{line}: {problem.text}")
    if len(lines) == 1:
        return lines[0]
    return "\n  ".join([f"{len(lines)} problems in the configuration:", *lines])


def _with_absolute_paths(config: C, document: Document | None, overrides: Sequence[Override]) -> C:
    """Paths in a file are relative to its folder, others to the working folder."""

    def absolute(path: JsonPath, value: Path) -> Path:
        origin = _origin(path, overrides)
        source = document if origin is None else origin.source
        folder = source.folder if isinstance(source, Document) else Path.cwd()
        return folder / value

    renew = config.identity.renew
    if renew is not None and renew.directory is not None:
        path = ("identity", "renew", "directory")
        renew = attrs.evolve(renew, directory=absolute(path, renew.directory))
    identity = IdentityFiles(
        cert=absolute(("identity", "cert"), config.identity.cert),
        key=absolute(("identity", "key"), config.identity.key),
        ca=absolute(("identity", "ca"), config.identity.ca),
        renew=renew,
    )
    state_dir = absolute(("state_dir",), config.state_dir)
    deny_list = config.deny_list and absolute(("deny_list",), config.deny_list)
    policy_key = config.policy_key and absolute(("policy_key",), config.policy_key)
    config = attrs.evolve(
        config, identity=identity, state_dir=state_dir, deny_list=deny_list, policy_key=policy_key
    )
    if isinstance(config, IntermediateConfig) and config.policy_file is not None:
        policy_file = absolute(("policy_file",), config.policy_file)
        config = attrs.evolve(config, policy_file=policy_file)
    return config


def _missing_files(config: AnyConfig) -> Iterator[Problem]:
    identity = config.identity
    files: list[tuple[JsonPath, Path]] = [
        (("identity", "cert"), identity.cert),
        (("identity", "key"), identity.key),
        (("identity", "ca"), identity.ca),
    ]
    hints: dict[JsonPath, str] = {
        ("policy_key",): "'ztna policy --help'",
        ("policy_file",): "'ztna policy --help'",
        ("deny_list",): "an empty one denies nobody; docs/operations.md",
    }
    if config.deny_list is not None:
        files.append((("deny_list",), config.deny_list))
    if config.policy_key is not None:
        files.append((("policy_key",), config.policy_key))
    if isinstance(config, IntermediateConfig) and config.policy_file is not None:
        files.append((("policy_file",), config.policy_file))
    for path, file in files:
        try:
            there = file.is_file()
        except (OSError, ValueError):  # a parent that may not be searched, a name too long
            there = False
        if not there:
            hint = hints.get(path, "'ztna pki --help'")
            yield Problem(path, f"there is no file {file}; {hint} tells how to make it")
        elif not os.access(file, os.R_OK):
            yield Problem(path, f"the file {file} may not be read by this user")
