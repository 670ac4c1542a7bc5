"""JSON values -> configuration classes, every problem collected; classes -> JSON schema.

cattrs builds the classes; the hooks here coerce nothing ("1300" is no number, true is no 1) and
refuse unknown keys. What cattrs raises is a tree of errors with notes; `structure` turns it into
a flat list of `Problem`s, each with the path of the value that is wrong.
"""

import difflib
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, TypeVar, get_args, get_origin

import attrs
import cattrs
from cattrs.errors import (
    AttributeValidationNote,
    BaseValidationError,
    ForbiddenExtraKeysError,
    IterableValidationError,
    IterableValidationNote,
)
from cattrs.gen import make_dict_structure_fn

from ztna.config.document import JsonPath, show
from ztna.config.values import HiddenMismatchError, ValueMismatchError, ValueType

T = TypeVar("T")

Described = Mapping[type, type]
"""Classes of other modules -> the class here that says what their keys mean."""


@attrs.frozen
class Problem:
    """One thing that is wrong: where, and what in words."""

    path: JsonPath
    text: str


class StructureError(Exception):
    """The value cannot become the class; `problems` has at least one entry."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(problems)
        self.problems = problems


def means(description: str) -> dict[str, str]:
    """Metadata of an attrs field: what a key of the configuration file is for."""
    return {"description": description}


def structure(value: object, cls: type[T], described: Described) -> T:
    """Build cls from a JSON value. Raises StructureError with everything that is wrong."""
    try:
        return _converter(described).structure(value, cls)
    except (BaseValidationError, ValueMismatchError) as error:
        raise StructureError(list(_problems(error, (), value))) from None


def _converter(described: Described) -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    converter.register_structure_hook_factory(attrs.has, _class_hook(converter))
    converter.register_structure_hook_factory(_is_list, _list_hook(converter))
    converter.register_structure_hook_factory(_is_value, _value_hook)
    for target, source in described.items():
        converter.register_structure_hook(target, _described_hook(converter, target, source))
    return converter


_FACTORY: type = type(attrs.Factory(tuple))
Hook = Callable[[object, Any], Any]


def _class_hook(converter: cattrs.Converter) -> Callable[[Any], Hook]:
    def factory(cls: Any) -> Hook:
        inner = make_dict_structure_fn(
            cls, converter, _cattrs_forbid_extra_keys=True, _cattrs_detailed_validation=True
        )

        def hook(value: object, _: Any) -> Any:
            if not isinstance(value, dict):
                raise ValueMismatchError("an object: {...}")
            return inner(value, cls)

        return hook

    return factory


def _list_hook(converter: cattrs.Converter) -> Callable[[Any], Hook]:
    def factory(cls: Any) -> Hook:
        item = get_args(cls)[0]

        def hook(value: object, _: Any) -> tuple[Any, ...]:
            if not isinstance(value, list):
                raise ValueMismatchError("a list: [...]")
            results, errors = [], []
            for index, entry in enumerate(value):
                try:
                    results.append(converter.structure(entry, item))
                except (BaseValidationError, ValueMismatchError) as error:
                    error.add_note(IterableValidationNote(f"entry {index}", index, item))
                    errors.append(error)
            if errors:
                raise IterableValidationError("list", errors, cls)
            return tuple(results)

        return hook

    return factory


def _value_hook(annotation: Any) -> Hook:
    value_type = value_type_of(annotation)
    assert value_type is not None
    return lambda value, _: value_type.parse(value)


def _described_hook(converter: cattrs.Converter, target: type, source: type) -> Hook:
    def hook(value: object, _: Any) -> Any:
        read: Any = converter.structure(value, source)
        return target(**attrs.asdict(read, recurse=False))

    return hook


def value_type_of(annotation: Any) -> ValueType | None:
    """The ValueType of an annotation, if it has one."""
    if get_origin(annotation) is Annotated:
        for extra in get_args(annotation)[1:]:
            if isinstance(extra, ValueType):
                return extra
    return None


def _is_value(annotation: Any) -> bool:
    return value_type_of(annotation) is not None


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple and get_args(annotation)[1:] == (Ellipsis,)


def without_none(annotation: Any) -> tuple[Any, bool]:
    """The annotation without `None`, and whether it allowed None."""
    if get_origin(annotation) in {typing.Union, types.UnionType}:
        rest = [arg for arg in get_args(annotation) if arg is not types.NoneType]
        if len(rest) == 1:
            return rest[0], True
    return annotation, False


def _problems(error: BaseException, path: JsonPath, value: object) -> Iterator[Problem]:
    if isinstance(error, BaseValidationError):
        for inner in error.exceptions:
            step = _step(inner)
            if isinstance(inner, KeyError) and isinstance(step, str):
                purpose = attrs.fields_dict(error.cl)[step].metadata["description"]
                yield Problem((*path, step), f"missing: {purpose}")
                continue
            yield from _problems(
                inner,
                path if step is None else (*path, step),
                value if step is None else _child(value, step),
            )
    elif isinstance(error, ForbiddenExtraKeysError):
        known = [field.name for field in attrs.fields(error.cl)]
        for name in sorted(error.extra_fields):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f'did you mean "{near[0]}"?' if near else f"known here: {', '.join(known)}"
            yield Problem((*path, name), f"unknown key {show(name)}; {hint}")
    else:
        shown = "the value" if isinstance(error, HiddenMismatchError) else show(value)
        yield Problem(path, f"{shown} is wrong; expected {error}")


def _step(error: BaseException) -> str | int | None:
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            return note.name
        if isinstance(note, IterableValidationNote):
            return note.index
    return None


def _child(value: object, step: str | int) -> object:
    if isinstance(value, dict):
        return value.get(step)
    if isinstance(value, list) and isinstance(step, int):
        return value[step]
    return None


@attrs.frozen
class ScalarKey:
    """A key that holds one value, not a list: it has an environment variable."""

    path: tuple[str, ...]
    value_type: ValueType

    @property
    def variable(self) -> str:
        """The environment variable's name: `$.tun.mtu` -> ZTNA_TUN_MTU."""
        return "_".join(("ZTNA", *self.path)).upper()

    def from_text(self, text: str) -> object:
        """The JSON value that an environment variable's text stands for.

        Text that does not fit stays text, and is refused as such by the value's own check.
        """
        kind = self.value_type.schema.get("type")
        if kind == "integer" and re.fullmatch(r"-?[0-9]{1,9}", text):
            return int(text)
        if kind == "boolean":
            return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
        return text


def scalar_keys(cls: type, prefix: tuple[str, ...] = ()) -> Iterator[ScalarKey]:
    """All scalar keys of a configuration class, depth first."""
    for field in attrs.fields(cls):
        annotation, _ = without_none(field.type)
        path = (*prefix, field.name)
        value_type = value_type_of(annotation)
        if value_type is not None:
            yield ScalarKey(path, value_type)
        elif attrs.has(annotation):
            yield from scalar_keys(annotation, path)


def schema_of(cls: type, described: Described) -> dict[str, object]:
    """JSON schema of a configuration class, an object that allows no other keys."""
    properties: dict[str, object] = {}
    required: list[str] = []
    for field in attrs.fields(described.get(cls, cls)):
        entry = _schema_of_type(field.type, described)
        entry["description"] = field.metadata["description"]
        properties[field.name] = entry
        if field.default is attrs.NOTHING:
            required.append(field.name)
        elif (default := _json_default(field.default)) is not None:
            entry["default"] = default
    schema: dict[str, object] = {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }
    if required:
        schema["required"] = required
    return schema


def _schema_of_type(annotation: Any, described: Described) -> dict[str, object]:
    inner, optional = without_none(annotation)
    if (value_type := value_type_of(inner)) is not None:
        schema = dict(value_type.schema)
    elif _is_list(inner):
        items = _schema_of_type(get_args(inner)[0], described)
        schema = {"type": "array", "items": items}
    else:
        schema = schema_of(inner, described)
    return {"anyOf": [schema, {"type": "null"}]} if optional else schema


def _json_default(default: Any) -> object:
    if isinstance(default, bool | int | str):
        return default
    # Factories depend on the machine or on other keys, () means absent.
    if default is None or default == () or isinstance(default, _FACTORY):
        return None
    return str(default)
