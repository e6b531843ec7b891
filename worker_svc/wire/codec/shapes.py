"""What is known of each message, worked out once: its class in protobuf's runtime, its layout on the wire, and how
each field goes over into the dataclass and back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import betterproto
from google.protobuf.message_factory import GetMessageClass

from worker_svc.job import ARGS_MAX, ENV_MAX, LABELS_MAX, InvalidArgument
from worker_svc.job.identity import GROUPS_MAX, PATHS_MAX
from worker_svc.job.limits import BY_NAME
from worker_svc.pb import jobscheduler
from worker_svc.wire.codec import wire
from worker_svc.wire.codec.lean import make_lean
from worker_svc.wire.pool import PACKAGE, POOL
from worker_svc.wire.times import datetime_of, duration_fields, timedelta_of, timestamp_fields

_Convert = Callable[[Any], Any]

# FieldDescriptor.TYPE_*
_DOUBLE, _INT64, _UINT64, _INT32, _BOOL, _STRING, _MESSAGE, _BYTES, _UINT32, _ENUM = 1, 3, 4, 5, 8, 9, 11, 12, 13, 14
_INT32_RANGE: Final = (-(2**31), 2**31 - 1)
_RANGES: Final = {
    _INT64: (-(2**63), 2**63 - 1),
    _UINT64: (0, 2**64 - 1),
    _INT32: _INT32_RANGE,
    _UINT32: (0, 2**32 - 1),
    _ENUM: _INT32_RANGE,  # open: numbers that have no name are the service's business
    _BOOL: (0, 1),
}
# double and float; fixed64 and fixed32, sfixed64 and sfixed32
_FIXED: Final = {1: wire.FIXED64, 2: wire.FIXED32, 6: wire.FIXED64, 7: wire.FIXED32, 15: wire.FIXED32, 16: wire.FIXED64}


# How many elements the lists and maps of a request may have, where it is not `_ELEMENTS_MAX`.
_MOST: Final = {
    "StartJobReq.args": ARGS_MAX,
    "StartJobReq.env": ENV_MAX,
    "StartJobReq.secret_env": ENV_MAX,
    "StartJobReq.labels": LABELS_MAX,
    "Limits.cpu_affinity": int(BY_NAME["cpu_affinity"].high) + 1,
    "Groups.names": GROUPS_MAX,
    "Sandbox.read_only_paths": PATHS_MAX,
    "Sandbox.read_write_paths": PATHS_MAX,
    "ListJobsReq.states": 16,
    "ListJobsReq.labels": LABELS_MAX,
}
_ELEMENTS_MAX: Final = 1000
# How often a field may be sent that there is one of: the last one holds.
_REPEATS_MAX: Final = 16


def _requests() -> set[str]:
    """The messages that a request can contain, and the requests: what is bounded. Answers are our own doing."""
    messages = POOL.FindFileByName("jobscheduler.proto").message_types_by_name
    found: set[str] = set()
    todo = [message for name, message in messages.items() if name.endswith("Req")]
    while todo:
        message = todo.pop()
        found.add(message.full_name)
        inner = [field.message_type for field in message.fields if field.message_type is not None]
        todo += [one for one in inner if one.full_name not in found]
    return found


_REQUESTS: Final = _requests()


def _most(field: Any) -> int:
    message = field.containing_type.full_name
    if message not in _REQUESTS:
        return wire.FIELDS_MAX
    if not field.is_repeated:
        return _REPEATS_MAX
    return _MOST.get(f"{message.removeprefix(PACKAGE + '.')}.{field.name}", _ELEMENTS_MAX)


_shapes: dict[type[Any], Shape] = {}


def shape_of(message_type: type[Any]) -> Shape:
    """Made when first asked for. Raises TypeError for what is no message of the contract."""
    shape = _shapes.get(message_type)
    if shape is None:
        if getattr(jobscheduler, message_type.__name__, None) is not message_type:
            raise TypeError(f"{message_type} is no message of the contract")
        descriptor = POOL.FindMessageTypeByName(f"{PACKAGE}.{message_type.__name__}")
        shape = _shapes[message_type] = Shape(message_type, descriptor)
    return shape


class Shape:
    def __init__(self, message_type: type[Any], descriptor: Any) -> None:
        make_lean(message_type)
        self.name = message_type.__name__
        self.layout = _layout_of(descriptor)
        self._message_type = message_type
        self._class = GetMessageClass(descriptor)
        self.parse: Callable[[bytes], Any] = self._class.FromString
        self._read: dict[int, tuple[str, _Convert | None]] = {}
        self._write: list[tuple[str, str, Any, bool, _Convert | None]] = []
        # What the dataclass holds when a field is not sent, besides betterproto's own three.
        self._defaults: dict[str, Any] = {"_serialized_on_wire": True, "_unknown_fields": b"", "_group_current": {}}
        self._fresh: list[tuple[str, Callable[[], Any]]] = []
        names = {betterproto.FieldMetadata.get(item).number: item.name for item in dataclasses.fields(message_type)}
        plain = message_type()
        for field in descriptor.fields:
            name = names[field.number]
            default = getattr(plain, name)
            is_message = isinstance(default, betterproto.Message)
            if isinstance(default, list | dict):
                self._fresh.append((name, type(default)))
            else:
                # The default of a message is made when it is read, which it seldom is.
                self._defaults[name] = betterproto.PLACEHOLDER if is_message else default
            self._read[field.number] = (name, _reader(field, message_type, name))
            self._write.append((name, field.name, default, is_message, _writer(field)))

    def fill(self, parsed: Any) -> Any:
        """The dataclass with what was parsed. Raises InvalidArgument."""
        # Past __init__, which takes 12 µs; with every field set, so that betterproto works out no default later.
        message = object.__new__(self._message_type)
        values = message.__dict__
        values.update(self._defaults)
        for name, make in self._fresh:
            values[name] = make()
        read = self._read
        for field, value in parsed.ListFields():
            name, convert = read[field.number]
            values[name] = value if convert is None else convert(value)
        return message

    def build(self, message: Any, *, mended: bool = False) -> Any:
        """The runtime's message. `mended`: with what is no Unicode (PEP 383) replaced."""
        given = self.given(message)
        return self._class(**(_mend(given) if mended else given))

    def field_at_fault(self, message: Any) -> str:
        """The field whose value `build` raises ValueError for."""
        given = self.given(message)
        for name, proto_name, *_ in self._write:
            try:
                self._class(**{proto_name: given.get(proto_name)})
            except ValueError:
                return name
        return self.name

    def given(self, message: Any) -> dict[str, Any]:
        """What is to be sent of the dataclass, by the names that the runtime's constructor takes."""
        values = message.__dict__
        given: dict[str, Any] = {}
        for name, proto_name, default, is_message, convert in self._write:
            value = values[name]
            if value is betterproto.PLACEHOLDER or value is None:
                continue
            if is_message:
                if not value._serialized_on_wire:
                    continue
            elif value == default:
                continue
            given[proto_name] = value if convert is None else convert(value)
        return given


def _mend(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if isinstance(value, list):
        return [_mend(item) for item in value]
    if isinstance(value, dict):
        return {_mend(key): _mend(item) for key, item in value.items()}
    return value


def _layout_of(descriptor: Any) -> wire.Layout:
    layout = wire.Layout(is_map_entry=descriptor.GetOptions().map_entry)
    for field in descriptor.fields:
        if field.type in _RANGES:
            low, high = _RANGES[field.type]
            known = wire.Field(field.name, wire.VARINT, low, high, is_packable=field.is_repeated)
        elif field.type in (_STRING, _BYTES):
            known = wire.Field(field.name, wire.BYTES, is_text=field.type == _STRING)
        elif field.type == _DOUBLE:
            assert not field.is_repeated, field.full_name  # the walk knows no packed ones
            known = wire.Field(field.name, wire.FIXED64)
        elif field.type in _FIXED:
            known = wire.Field(field.name, _FIXED[field.type])
            assert not field.is_repeated, f"{field.full_name}: packed numbers of a fixed size are not walked through"
        else:
            # There is nothing else, and no message that contains itself.
            assert field.type == _MESSAGE, field.full_name
            known = wire.Field(field.name, wire.BYTES, layout=_layout_of(field.message_type))
        known.most = _most(field)
        layout.fields[field.number] = known
    return layout


def _is_map(field: Any) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _reader(field: Any, message_type: type[Any], name: str) -> _Convert | None:
    """How the runtime's value becomes the dataclass's; None: as it is."""
    if _is_map(field):
        return _bounded(field, dict)
    one = _reader_of_one(field, message_type, name)
    if not field.is_repeated:
        return one
    return _bounded(field, list if one is None else lambda values: [one(value) for value in values])


def _bounded(field: Any, convert: _Convert) -> _Convert:
    most = _most(field)

    def checked(values: Any) -> Any:
        if len(values) > most:
            raise InvalidArgument(field.name, f"must be at most {most}, not {len(values)}")
        return convert(values)

    return checked


def _reader_of_one(field: Any, message_type: type[Any], name: str) -> _Convert | None:
    path = field.name
    match field.message_type and field.message_type.full_name:
        case "google.protobuf.Duration":
            return lambda value: timedelta_of(value, path)
        case "google.protobuf.Timestamp":
            return lambda value: datetime_of(value, path)
        case None if field.enum_type is None:
            return None
        case None:
            enum: Any = message_type._betterproto.cls_by_field[name]
            members: dict[int, Any] = {member.value: member for member in enum}
            return lambda value: members.get(value) or enum.try_value(value)
    inner = shape_of(getattr(jobscheduler, field.message_type.name))

    def fill(value: Any) -> Any:
        try:
            return inner.fill(value)
        except InvalidArgument as error:
            raise InvalidArgument(f"{path}.{error.message}") from None

    return fill


def _writer(field: Any) -> _Convert | None:
    """How the dataclass's value becomes what the runtime's constructor takes; None: as it is."""
    if _is_map(field) or field.message_type is None:
        return None
    match field.message_type.full_name:
        case "google.protobuf.Duration":
            one: _Convert = duration_fields
        case "google.protobuf.Timestamp":
            one = timestamp_fields
        case _:
            one = shape_of(getattr(jobscheduler, field.message_type.name)).given
    if field.is_repeated:
        return lambda values: [one(value) for value in values]
    return one
