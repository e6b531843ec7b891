"""The states of a job, how it ends, and signals."""

from __future__ import annotations

import os
import signal
import subprocess
from itertools import product
from pathlib import Path

import pytest

from tests.support.programs import exits, kills_self
from worker_svc.config import JobsConfig
from worker_svc.job import (
    Event,
    Exit,
    IllegalTransition,
    JobState,
    Outcome,
    StopCause,
    error_text,
    exit_text,
    next_state,
    outcome_of,
    parse_signal,
    signal_name,
)

SAME, NEVER = "nothing changes", "cannot happen"

# The whole of it, each pair once: rows are states, columns the events below.
EVENTS = [
    Event.ENQUEUE, Event.LAUNCH, Event.SPAWNED, Event.SPAWN_FAILED, Event.STOP, Event.EXIT, Event.LOSE, Event.PAUSE,
    Event.RESUME, Event.REMARK,
]  # fmt: skip

QUEUED, STARTING, RUNNING, STOPPING, FINISHED = list(JobState)[1:]

TABLE: dict[JobState, list[JobState | str]] = {
    JobState.NEW: [QUEUED, STARTING, NEVER, NEVER, NEVER, NEVER, NEVER, NEVER, NEVER, NEVER],
    JobState.QUEUED: [NEVER, STARTING, NEVER, NEVER, FINISHED, NEVER, FINISHED, NEVER, NEVER, NEVER],
    JobState.STARTING: [NEVER, NEVER, RUNNING, FINISHED, SAME, NEVER, FINISHED, NEVER, NEVER, NEVER],
    JobState.RUNNING: [NEVER, NEVER, NEVER, NEVER, STOPPING, FINISHED, FINISHED, RUNNING, RUNNING, RUNNING],
    JobState.STOPPING: [NEVER, NEVER, NEVER, NEVER, SAME, FINISHED, FINISHED, NEVER, NEVER, STOPPING],
    JobState.FINISHED: [NEVER, NEVER, NEVER, NEVER, SAME, NEVER, NEVER, NEVER, NEVER, NEVER],
}


def test_the_table_here_is_whole() -> None:
    assert set(TABLE) == set(JobState)
    assert sorted(EVENTS) == sorted(Event)


@pytest.mark.parametrize("state, event", list(product(JobState, Event)), ids=lambda value: value.name)
def test_every_state_answers_every_event(state: JobState, event: Event) -> None:
    expected = TABLE[state][EVENTS.index(event)]
    if expected is NEVER:
        with pytest.raises(IllegalTransition, match=rf"{event.name} cannot happen .* {state.name}"):
            next_state(state, event)
    else:
        assert next_state(state, event) == (None if expected is SAME else expected)


def test_states_only_move_on() -> None:
    for state, row in TABLE.items():
        assert all(to_state >= state for to_state in row if isinstance(to_state, JobState))


@pytest.mark.parametrize(
    "ended, cause, outcome, limit, text",
    [
        (Exit(0, None), StopCause.NONE, Outcome.SUCCEEDED, "", ""),
        (Exit(1, None), StopCause.NONE, Outcome.FAILED, "", "exit status 1"),
        (Exit(255, None), StopCause.NONE, Outcome.FAILED, "", "exit status 255"),
        (Exit(None, 9), StopCause.NONE, Outcome.SIGNALED, "", "signal: killed"),
        (Exit(None, 11), StopCause.NONE, Outcome.SIGNALED, "", "signal: segmentation fault"),
        (Exit(None, 15), StopCause.REQUEST, Outcome.STOPPED, "", "signal: terminated"),
        (Exit(None, 9), StopCause.REQUEST, Outcome.STOPPED, "", "signal: killed"),
        (Exit(0, None), StopCause.REQUEST, Outcome.STOPPED, "", "stopped (exit status 0)"),
        (Exit(5, None), StopCause.REQUEST, Outcome.STOPPED, "", "stopped (exit status 5)"),
        (
            Exit(None, 15),
            StopCause.TIMEOUT,
            Outcome.TIMED_OUT,
            "timed out after 1.5 s",
            "timed out after 1.5 s (signal: terminated)",
        ),
        (Exit(0, None), StopCause.TIMEOUT, Outcome.TIMED_OUT, "timed out", "timed out (exit status 0)"),
        (Exit(None, 15), StopCause.OUTPUT, Outcome.OUTPUT_LIMIT, "wrote more", "wrote more (signal: terminated)"),
    ],
)
def test_how_a_job_ends(ended: Exit, cause: StopCause, outcome: Outcome, limit: str, text: str) -> None:
    assert outcome_of(ended, cause) is outcome
    assert error_text(ended, outcome, limit) == text


def test_every_cause_has_an_outcome_and_none_is_a_success() -> None:
    for cause in set(StopCause) - {StopCause.NONE}:
        assert outcome_of(Exit(0, None), cause) not in (Outcome.NONE, Outcome.SUCCEEDED)


@pytest.mark.parametrize(
    "number, words",
    [
        (signal.SIGHUP, "hangup"),
        (signal.SIGINT, "interrupt"),
        (signal.SIGQUIT, "quit"),
        (signal.SIGILL, "illegal instruction"),
        (signal.SIGTRAP, "trace/breakpoint trap"),
        (signal.SIGABRT, "aborted"),
        (signal.SIGBUS, "bus error"),
        (signal.SIGFPE, "floating point exception"),
        (signal.SIGKILL, "killed"),
        (signal.SIGUSR1, "user defined signal 1"),
        (signal.SIGSEGV, "segmentation fault"),
        (signal.SIGUSR2, "user defined signal 2"),
        (signal.SIGPIPE, "broken pipe"),
        (signal.SIGALRM, "alarm clock"),
        (signal.SIGTERM, "terminated"),
        (16, "stack fault"),
        (signal.SIGCHLD, "child exited"),
        (signal.SIGCONT, "continued"),
        (signal.SIGSTOP, "stopped (signal)"),
        (signal.SIGTSTP, "stopped"),
        (signal.SIGTTIN, "stopped (tty input)"),
        (signal.SIGTTOU, "stopped (tty output)"),
        (signal.SIGURG, "urgent I/O condition"),
        (signal.SIGXCPU, "CPU time limit exceeded"),
        (signal.SIGXFSZ, "file size limit exceeded"),
        (signal.SIGVTALRM, "virtual timer expired"),
        (signal.SIGPROF, "profiling timer expired"),
        (signal.SIGWINCH, "window changed"),
        (signal.SIGIO, "I/O possible"),
        (signal.SIGPWR, "power failure"),
        (signal.SIGSYS, "bad system call"),
        (signal.SIGRTMIN, "signal 34"),
        (signal.SIGRTMAX, "signal 64"),
    ],
)
def test_signals_in_the_words_of_go(number: int, words: str) -> None:
    """runtime/zerrors_linux_amd64.go: var signals."""
    assert exit_text(Exit(None, int(number))) == f"signal: {words}"


@pytest.mark.parametrize(
    "argv, expected",
    [
        (exits(0), Exit(0, None)),
        (exits(1), Exit(1, None)),
        (exits(127), Exit(127, None)),
        (exits(255), Exit(255, None)),
        (kills_self(signal.SIGTERM), Exit(None, 15)),
        (kills_self(signal.SIGSEGV), Exit(None, 11)),
        (kills_self(signal.SIGRTMAX), Exit(None, 64)),
    ],
)
def test_a_real_wait_status(argv: list[str], expected: Exit) -> None:
    child = subprocess.Popen(argv)
    _, status = os.waitpid(child.pid, 0)
    child.returncode = 0
    assert Exit.from_wait_status(status) == expected


def test_a_core_dump_does_not_hide_the_signal() -> None:
    assert Exit.from_wait_status(0x80 | signal.SIGSEGV) == Exit(None, signal.SIGSEGV)


@pytest.mark.parametrize(
    "text, number",
    [
        ("SIGTERM", 15),
        ("TERM", 15),
        ("term", 15),
        ("sigterm", 15),
        (" KILL ", 9),
        ("15", 15),
        ("SIGRTMIN", 34),
        ("64", 64),
        ("SIGRTMIN+1", 35),
        ("rtmax-2", 62),
        ("SIG37", 37),
        ("SIGIO", 29),
        ("POLL", 29),
    ],
)
def test_signals_that_can_be_named(text: str, number: int) -> None:
    assert parse_signal(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "0",
        "65",
        "-9",
        "9.0",
        "SIG",
        "SIGNONE",
        "SIG_DFL",
        "15 9",
        "\u0661\u0665",
        "²",
        "9" * 40,
        "SIGSIGTERM",
        "SIG9",
        "SIGRTMIN+31",
    ],
)
def test_signals_that_cannot(text: str) -> None:
    with pytest.raises(ValueError, match="there is no signal"):
        parse_signal(text)


@pytest.mark.parametrize("number", sorted(map(int, signal.valid_signals())))
def test_a_signals_name_and_number_lead_back_to_it(number: int) -> None:
    assert parse_signal(str(number)) == number
    assert parse_signal(signal_name(number)) == number
    # As the configuration has it, too.
    assert JobsConfig(cwd=Path("/"), stop_signal=signal_name(number)).stop_signal_number == number
