"""Between protobuf messages and frozen dataclasses whose fields have the same names, so that no wire type leaks out."""

import dataclasses
import functools
import types
import typing
from collections.abc import Hashable
from enum import Enum
from typing import TypeVar, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_Record = TypeVar("_Record")
_Message = TypeVar("_Message", bound=Message)


def decode_message(message: Message, record_type: type[_Record]) -> _Record:
    """Builds the dataclass from the message's fields of the same names; fields it does not name are left out.

    Nested messages become the dataclasses the fields are annotated with, repeated fields tuples, enums the member
    whose value is the wire name without its prefix in lower case (`unspecified` for one we do not know yet), and
    absent `optional` fields None.
    """
    values: dict[str, object] = {}
    for name, (hint, optional) in _fields_of(cast("Hashable", record_type)).items():
        field = cast("FieldDescriptor", message.DESCRIPTOR.fields_by_name[name])
        if optional and not message.HasField(name):
            values[name] = None
        elif typing.get_origin(hint) is tuple:
            (item_hint, _) = typing.get_args(hint)
            values[name] = tuple(_decode_value(field, item, item_hint) for item in getattr(message, name))
        else:
            values[name] = _decode_value(field, getattr(message, name), cast("type", hint))
    return record_type(**values)


def encode_message(record: object, message_type: type[_Message]) -> _Message:
    """The inverse of `decode_message`: a message with the record's fields."""
    message = message_type()
    _fill(message, record)
    return message


def _fill(message: Message, record: object) -> None:
    for name in _fields_of(cast("Hashable", type(record))):
        value = getattr(record, name)
        if isinstance(value, tuple) and any(dataclasses.is_dataclass(item) for item in value):
            for item in value:
                _fill(getattr(message, name).add(), item)
        elif isinstance(value, tuple):
            getattr(message, name).extend(value)
        elif dataclasses.is_dataclass(value):
            getattr(message, name).SetInParent()
            _fill(getattr(message, name), value)
        elif value is not None:
            setattr(message, name, _encode_enum(message, name, value) if isinstance(value, Enum) else value)


def _encode_enum(message: Message, name: str, member: Enum) -> int:
    enum_type = cast("FieldDescriptor", message.DESCRIPTOR.fields_by_name[name]).enum_type
    assert enum_type is not None, f"{name} is not an enum"
    prefix = enum_type.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return enum_type.values_by_name[f"{prefix}{member.value.upper()}"].number


@functools.cache
def _fields_of(record_type: Hashable) -> dict[str, tuple[object, bool]]:
    """Each field's annotation without `| None`, and whether it had one."""
    assert isinstance(record_type, type), f"{record_type} is not a class"
    assert dataclasses.is_dataclass(record_type), f"{record_type} is not a dataclass"
    hints = typing.get_type_hints(record_type)
    fields: dict[str, tuple[object, bool]] = {}
    for field in dataclasses.fields(record_type):
        hint = hints[field.name]
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        fields[field.name] = (options[0], type(None) in options)
    return fields


def _decode_value(field: FieldDescriptor, value: object, hint: type) -> object:
    if isinstance(value, Message):
        return decode_message(value, hint)
    if field.enum_type is not None:
        return _decode_enum(field, cast("int", value), hint)
    return value


def _decode_enum(field: FieldDescriptor, number: int, enum_type: type[Enum]) -> Enum:
    assert field.enum_type is not None, f"{field.name} is not an enum"
    prefix = field.enum_type.values_by_number[0].name.removesuffix("UNSPECIFIED")
    known = field.enum_type.values_by_number.get(number)
    name = known.name.removeprefix(prefix).lower() if known else "unspecified"
    return enum_type(name if name in {member.value for member in enum_type} else "unspecified")
