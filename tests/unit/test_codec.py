"""The codec: bytes to messages and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import betterproto
import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from hypothesis import example as with_example
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.codec import refusal
from tests.support.fuzzing import (
    FRAMES,
    MESSAGES,
    REQUESTS,
    Mutator,
    check_codec,
    check_frames,
    corpus,
    example,
    varint,
)
from worker_svc.job import InvalidArgument
from worker_svc.pb import jobscheduler as pb
from worker_svc.wire.codec import MessageCodec, decode, encode
from worker_svc.wire.codec.shapes import shape_of

NAMES = [kind.__name__ for kind in MESSAGES]


# Writing


@pytest.mark.parametrize(
    "message,expected",
    [
        (pb.StartJobReq(), b""),
        (pb.StartJobReq(command="bash", path="x.sh"), b"\x0a\x04bash\x12\x04x.sh"),
        (pb.StartJobRes(job_id="42"), b"\x0a\x0242"),
        (pb.StopJobReq(job_id="42"), b"\x0a\x0242"),
        (pb.StopJobRes(), b""),
        (pb.QueryJobReq(job_id="é"), b"\x0a\x02\xc3\xa9"),
        (pb.QueryJobRes(), b""),
        (pb.QueryJobRes(done=True, error=True, error_text="exit status 3"), b"\x08\x01\x10\x01\x1a\x0dexit status 3"),
        (pb.RegisterReq(address="h:1"), b"\x0a\x03h:1"),
        (pb.RegisterRes(success=True, worker_id="7"), b"\x08\x01\x12\x017"),
        (pb.DeregisterReq(worker_id="7"), b"\x0a\x017"),
        (pb.DeregisterRes(success=True), b"\x08\x01"),
    ],
)
def test_the_original_messages_byte_for_byte(message: Any, expected: bytes) -> None:
    assert encode(message) == expected
    assert decode(expected, type(message)) == message


@pytest.mark.parametrize("kind", MESSAGES, ids=NAMES)
def test_every_field_of_every_message_comes_through(kind: type[Any]) -> None:
    message = example(kind)
    plain = kind()
    for field in dataclasses.fields(kind):
        assert getattr(message, field.name) != getattr(plain, field.name), field.name
    there = decode(encode(message), kind)
    assert there == message
    # betterproto's own parser reads what we write (its Durations go wrong below zero, its messages within lists too).
    if not _has_duration(kind):
        assert kind().parse(encode(message)) == message


def _has_duration(kind: type[Any]) -> bool:
    values = [getattr(example(kind), field.name) for field in dataclasses.fields(kind)]
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    return any(
        isinstance(one, timedelta) or (isinstance(one, betterproto.Message) and _has_duration(type(one)))
        for one in flat
    )


@pytest.mark.parametrize("kind", MESSAGES, ids=NAMES)
def test_a_message_of_defaults_is_empty(kind: type[Any]) -> None:
    assert encode(kind()) == b""
    message = decode(b"", kind)
    assert message == kind()
    assert encode(message) == b""
    for field in dataclasses.fields(kind):  # also after each default was read
        getattr(message, field.name)
    assert encode(message) == b""


def test_what_is_read_can_be_changed_and_does_not_leak_into_the_next() -> None:
    first = decode(b"", pb.StartJobReq)
    first.args.append("x")
    first.env["K"] = "v"
    first.command = "changed"
    second = decode(b"", pb.StartJobReq)
    assert (second.args, second.env, second.command) == ([], {}, "")
    assert encode(first) == b"\x0a\x07changed\x52\x01x\x5a\x06\x0a\x01K\x12\x01v"


def test_an_empty_message_is_sent_as_one_when_it_was_set() -> None:
    assert encode(pb.WaitJobRes()) == b""
    assert encode(pb.WaitJobRes(job=pb.Job())) == b""  # as betterproto: given nothing, it is not there
    assert encode(decode(b"\x52\x00", pb.WaitJobRes)) == b"\x52\x00"
    assert encode(pb.WaitJobRes(job=pb.Job(job_id="x"))) == b"\x52\x03\x52\x01x"


def test_zero_keeps_its_presence() -> None:
    message = pb.Job(exit_code=0, wall_time=timedelta(0), accepted_at=datetime(1970, 1, 1, tzinfo=UTC))
    there = decode(encode(message), pb.Job)
    assert (there.exit_code, there.wall_time, there.accepted_at) == (0, timedelta(0), datetime(1970, 1, 1, tzinfo=UTC))
    assert (there.peak_memory_bytes, there.cpu_time, there.started_at) == (None, None, None)


def test_text_that_is_no_unicode_is_mended_not_lost() -> None:
    message = pb.Job(job_id="x", output_file="/a\udcff", spec=pb.JobSpec(env={"K\udcff": "v"}, args=["\udcff"]))
    there = decode(encode(message), pb.Job)
    assert (there.output_file, there.spec.env, there.spec.args) == ("/a\ufffd", {"K\ufffd": "v"}, ["\ufffd"])


@pytest.mark.parametrize(
    "message",
    [
        pb.OutputChunk(offset=-1),
        pb.OutputChunk(offset=2**64),
        pb.Job(exit_code=2**31),
        pb.Job(pid=2**63),
        pb.Job(job_id=7),  # type: ignore[arg-type]
        pb.Job(wall_time=timedelta(days=200_000_000)),
        pb.OutputChunk(data="text"),  # type: ignore[arg-type]
    ],
)
def test_what_does_not_fit_is_our_fault_and_said(message: Any) -> None:
    with pytest.raises(GRPCError) as caught:
        MessageCodec().encode(message, type(message))
    assert caught.value.status is Status.INTERNAL


def test_an_answer_of_another_type() -> None:
    with pytest.raises(GRPCError, match="no StopJobRes"):
        MessageCodec().encode(pb.StartJobRes(), pb.StopJobRes)


def test_what_is_no_message_of_ours() -> None:
    with pytest.raises(TypeError, match="no message of the contract"):
        decode(b"", type("StartJobReq", (), {}))


# Reading


@pytest.mark.parametrize(
    "data,words",
    [
        (b"\x0a\x05he", "command: is cut off: 5 bytes are announced, 2 left"),
        (b"\x0a", "command: is cut off"),
        (b"\x0a\x80", "command: is cut off"),
        (b"\x80", "the StartJobReq: is cut off"),
        (b"\x08\x05", "command: must be sent as bytes of a given length, not a varint"),
        (b"\x0d\0\0\0\0", "command: must be sent as bytes of a given length, not 4 bytes"),
        (b"\x09\0\0\0\0\0\0\0\0", "command: must be sent as bytes of a given length, not 8 bytes"),
        (b"\x92\x01\x01x", "separate_stderr: must be sent as a varint, not bytes"),
        (b"\x0b\x0c", "command: field 1 is a group"),
        (b"\x9b\x06\x9c\x06", "the StartJobReq: field 99 is a group"),
        (b"\x0b" * 200 + b"\x0c" * 200, "command: field 1 is a group"),
        (b"\x0c", "command: field 1 is a group"),
        (b"\x0a\x02\xc3\x28", "command: is not valid UTF-8: invalid continuation byte at byte 0"),
        (b"\x0a\x03\xed\xa0\x80", "command: is not valid UTF-8"),
        (b"\x00\x00", "the StartJobReq: there is no field number 0"),
        (b"\x02\x00", "the StartJobReq: there is no field number 0"),
        (b"\x90\x01" + b"\xff" * 10, "separate_stderr: a varint is longer than 10 bytes"),
        (b"\x90\x01" + b"\xff" * 9 + b"\x02", "separate_stderr: a varint is larger than 64 bits"),
        (b"\xfa\xff\xff\xff\xff\x0f\x00", "there is no field number"),
        (b"\x90\x01\x02", "separate_stderr: must be from 0 to 1, not 2"),
        (b"\xa8\x01" + varint(2**31), "output_policy: must be from -2147483648 to 2147483647, not 2147483648"),
        (b"\xa8\x01" + varint(2**32 + 1), "output_policy: must be from"),
        (b"\x0e", "command: field 1 has wire type 6"),
        (b"\x5a\x02\x08\x01", "env.key: must be sent as bytes of a given length, not a varint"),
        (b"\x5a\x03\x1a\x01x", "env: an entry has a field 3"),
        (b"\x5a\x03\x0a\x05x", "env.key: is cut off"),
        (b"\x72\x02\x0a\x00", "timeout.seconds: must be sent as a varint"),
        (b"\x72\x06\x10" + varint(2**31), "timeout.nanos: must be from -2147483648"),
        (b"\x0d\0\0\0", "command: is cut off"),
        (b"\x9d\x06\0\0\0", "the StartJobReq: is cut off"),
    ],
)
def test_what_is_malformed_is_refused_by_name(data: bytes, words: str) -> None:
    assert words in refusal(data)


def test_an_enum_in_a_packed_list_is_in_range() -> None:
    assert "states: must be from" in refusal(b"\x52\x05" + varint(2**32), pb.ListJobsReq)
    assert decode(b"\x52\x02\x01\x03\x50\x05", pb.ListJobsReq).states == [1, 3, 5]
    assert decode(b"\x50\x05", pb.ListJobsReq).states == [pb.JobState.FINISHED]
    assert "page_size: must be from" in refusal(b"\x70" + varint(2**31), pb.ListJobsReq)
    assert decode(b"\x70" + varint(2**64 - 1), pb.ListJobsReq).page_size == -1


def test_unknown_fields_and_numbers_without_a_name_are_no_fault() -> None:
    known = b"\x0a\x04true"
    later = b"\x98\x06\x05" + b"\x9a\x06\x03abc" + b"\x9d\x06abcd" + b"\x99\x06abcdefgh"
    assert decode(known + later, pb.StartJobReq) == pb.StartJobReq(command="true")
    assert decode(later + known, pb.StartJobReq) == pb.StartJobReq(command="true")
    assert int(decode(b"\xa8\x01\x63", pb.StartJobReq).output_policy) == 99


def test_other_forms_of_the_same_are_read() -> None:
    assert decode(b"\x0a\x81\x00a", pb.StartJobReq).command == "a"  # a length with a byte too many
    assert decode(b"\x12\x01b\x0a\x01a", pb.StartJobReq) == pb.StartJobReq(command="a", path="b")  # in another order
    assert decode(b"\x0a\x01a\x0a\x01b", pb.StartJobReq).command == "b"  # twice: the last one counts
    assert decode(b"\x0a\x00", pb.StartJobReq).command == ""  # a default, sent all the same
    # A message that comes in pieces is put together.
    assert decode(b"\x72\x02\x08\x05\x72\x02\x10\x00", pb.StartJobReq).timeout == timedelta(seconds=5)
    there = decode(b"\x52\x03\x52\x01a\x52\x03\x88\x01\x07", pb.WaitJobRes).job
    assert (there.job_id, there.pid) == ("a", 7)
    entry = b"\x5a\x06\x0a\x01k\x12\x01"
    assert decode(entry + b"a" + entry + b"b", pb.StartJobReq).env == {"k": "b"}
    assert decode(b"\x5a\x00", pb.StartJobReq).env == {"": ""}


def test_nothing_deep_or_large_hurts() -> None:
    nested = b""
    for _ in range(5000):
        nested = b"\x9a\x06" + varint(len(nested)) + nested
    assert decode(nested, pb.StartJobReq) == pb.StartJobReq()
    assert decode(b"\x52\x00" * 4096, pb.StartJobReq).args == [""] * 4096


BOMBS: dict[str, tuple[type[Any], bytes, bytes, str]] = {
    # What is sent, and how it begins, with as much of the second as there is room for; and the field it is refused for.
    "states": (pb.ListJobsReq, b"\x50\x05", b"", "states"),
    "states, packed": (pb.ListJobsReq, b"\x05", b"\x52", "states"),
    "labels": (pb.ListJobsReq, b"\x5a\x06\x0a\x01a\x12\x01b", b"", "labels"),
    "page_size": (pb.ListJobsReq, b"\x70\x01", b"", "page_size"),
    "unknown fields": (pb.ListJobsReq, b"\xf8\x07\x01", b"", "the ListJobsReq"),
    "job_ids": (pb.WatchJobsReq, b"\x5a\x00", b"", "job_ids"),
    "args": (pb.StartJobReq, b"\x52\x00", b"", "args"),
    "env": (pb.StartJobReq, b"\x5a\x00", b"", "env"),
    "env, within an entry": (pb.StartJobReq, b"\x0a\x00", b"\x5a", "env.key"),
    "rlimits": (pb.StartJobReq, b"\xa2\x01\x00", b"\xb2\x01", "limits.rlimits"),
    "cpu_affinity": (pb.StartJobReq, b"\x01", b"\xb2\x01\xb2\x01", "limits.cpu_affinity"),
    "groups": (pb.StartJobReq, b"\x52\x00", b"\xba\x01\x62", "identity.groups.names"),
    "paths": (pb.StartJobReq, b"\x5a\x00", b"\xc2\x01", "sandbox.read_write_paths"),
    "times": (pb.ListJobsReq, b"\x08\x01", b"\x62", "accepted_since.seconds"),
}


def bomb(name: str, size: int) -> tuple[type[Any], bytes]:
    kind, part, around, _ = BOMBS[name]
    data = part * (size // len(part))
    if name in ("cpu_affinity", "groups"):
        data, around = around[2:] + varint(len(data)) + data, around[:2]
    return kind, (around + varint(len(data)) + data if around else data)


@pytest.mark.parametrize("name", BOMBS)
def test_work_is_bounded_whatever_is_sent(name: str) -> None:
    """Slices of a thousand fields are counted, not the time that they take."""
    slices: list[int] = []
    for size in (160_000, 800_000, 4_000_000):
        kind, data = bomb(name, size)
        slices.append(0)
        with pytest.raises(InvalidArgument) as caught:  # noqa: PT012
            for _ in MessageCodec().check(data, kind):
                slices[-1] += 1
        assert caught.value.message.startswith(f"{BOMBS[name][3]}: ")
    assert max(slices) <= 20, slices


@pytest.mark.parametrize("kind", REQUESTS, ids=[kind.__name__ for kind in REQUESTS])
def test_every_list_of_a_request_is_bounded(kind: type[Any]) -> None:
    """In small messages too, before anything is made of it."""

    def bounds(layout: Any, path: str) -> Iterator[tuple[str, int]]:
        for field in layout.fields.values():
            yield f"{path}{field.name}", field.most
            if field.layout is not None:
                yield from bounds(field.layout, f"{path}{field.name}.")

    assert all(most <= 8192 for _, most in bounds(shape_of(kind).layout, ""))


def test_the_bound_of_a_list_holds_in_a_small_message() -> None:
    assert decode(encode(pb.ListJobsReq(states=[pb.JobState(3)] * 16)), pb.ListJobsReq)
    assert refusal(b"\x52\x11" + b"\x03" * 17, pb.ListJobsReq) == "states: must be at most 16, not 17"
    assert refusal(encode(pb.WatchJobsReq(job_ids=["x"] * 1001)), pb.WatchJobsReq).startswith(
        "job_ids: must be at most"
    )


# What hypothesis and a mutator of our own find


@pytest.mark.parametrize("kind", REQUESTS, ids=[kind.__name__ for kind in REQUESTS])
def test_random_bytes(kind: type[Any]) -> None:
    @settings(max_examples=200, deadline=None, database=None)
    @given(st.binary(max_size=200))
    @with_example(b"\x0a\x05he")
    def check(data: bytes) -> None:
        check_codec(kind, data)

    check()


@pytest.mark.parametrize("kind", REQUESTS, ids=[kind.__name__ for kind in REQUESTS])
def test_mutated_messages(kind: type[Any]) -> None:
    seeds = corpus(kind)

    @settings(max_examples=200, deadline=None, database=None)
    @given(st.sampled_from(seeds), st.sampled_from(seeds), st.integers(0, 2**32))
    def check(data: bytes, other: bytes, seed: int) -> None:
        mutator = Mutator(seed)
        check_codec(kind, mutator.mutate(data, other))
        check_codec(kind, mutator.fields(kind))

    check()


def test_a_thousand_of_each() -> None:
    """As scripts/fuzz does, in small. Both must be met: what is read, and what is refused."""
    for kind in MESSAGES:
        seeds, mutator, read = corpus(kind), Mutator(1), 0
        for number in range(1000):
            made = mutator.fields(kind) if number % 3 == 0 else mutator.mutate(*mutator.random.choices(seeds, k=2))
            read += check_codec(kind, made)
        assert 0 < read < 1000, kind


def test_frames_of_the_unix_socket() -> None:
    mutator, whole = Mutator(2), 0
    for _ in range(3000):
        data = b"".join(mutator.random.choices(FRAMES, k=3))
        data = data if mutator.random.random() < 0.2 else mutator.mutate(data, FRAMES[1])
        whole += check_frames(data, mutator.random.randrange(len(data) + 1))
    assert 0 < whole < 3000


# The dataclasses made lean


def test_lean_messages_behave_as_betterprotos_own() -> None:
    shape_of(pb.Job)
    made = pb.Job(job_id="a")
    assert made.spec == pb.JobSpec()
    assert made.exit_code is None
    assert made.accepted_at is None
    assert bool(made) is True
    assert bool(pb.Job()) is False
    assert pb.Job() != pb.JobSpec()
    made.exit_code = 3
    assert bytes(made) == encode(made)
    assert made.to_dict() == {"jobId": "a", "exitCode": 3}
    assert pb.Job().from_dict(made.to_dict()) == made
    with pytest.raises(AttributeError):
        _ = made.nothing  # type: ignore[attr-defined]
