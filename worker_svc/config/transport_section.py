"""The section `[transport]`, as declared in `sections`."""

from dataclasses import dataclass

from worker_svc.config.declare import A_MOMENT_S, Section, declare
from worker_svc.config.kinds import Whole, seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportConfig(Section):
    """What one client may take of the worker, so that none can hurt the others."""

    max_message_bytes: int = declare(
        4 * 1024 * 1024, Whole(1024, 2**30), "The largest request. Larger ones are refused (RESOURCE_EXHAUSTED) unread."
    )
    max_receiving_bytes: int = declare(
        64 * 1024 * 1024,
        Whole(1024, 2**40),
        "Memory for requests that are still arriving, in all; one connection may take a quarter.",
    )
    max_sending_bytes: int = declare(
        32 * 1024 * 1024,
        Whole(1024, 2**40),
        "Answers that are made and not yet sent, in all; one identity may have a quarter. What a client does not read "
        "is not made.",
    )
    max_header_bytes: int = declare(64 * 1024, Whole(1024, 2**20), "The most that a request's headers may take.")
    max_metadata: int = declare(64, Whole(0, 10_000), "Entries of metadata a request may have.")
    max_connections: int = declare(
        1024, Whole(1, 1_000_000), "Connections at once; at most half of the files this process may open."
    )
    max_connections_per_peer: int = declare(
        256, Whole(1, 1_000_000), "Connections at once from one address, or one user of the unix socket."
    )
    max_streams: int = declare(
        2048,
        Whole(8, 1_000_000),
        "Calls at once on one connection. An eighth is kept free of calls that last: streams and waits.",
    )
    connect_timeout_s: float = declare(
        10.0, seconds(A_MOMENT_S), "Seconds a new connection has for its handshake and its first bytes."
    )
    request_timeout_s: float = declare(
        30.0,
        seconds(A_MOMENT_S),
        "Seconds a request may take to arrive, from its headers to its last byte, and its answer to be read.",
    )
    idle_timeout_s: float = declare(
        1800.0, seconds(), "Seconds without a call after which a connection is closed. 0: never."
    )
    keepalive_s: float = declare(
        60.0, seconds(), "Seconds without a sign of a client after which it is asked for one (PING). 0: never."
    )
    keepalive_timeout_s: float = declare(
        20.0, seconds(A_MOMENT_S), "Seconds it then has before the connection is taken for dead."
    )
    requests_per_s: int = declare(
        10_000, Whole(0, 10_000_000), "Requests a second that one identity may make, over all connections. 0: any."
    )
    requests_burst: int = declare(20_000, Whole(1, 10_000_000), "Requests it may make at once after it was quiet.")
    resets_per_s: int = declare(
        100,
        Whole(1, 1_000_000),
        "Calls a second that a connection may drop right after making them; it is closed (ENHANCE_YOUR_CALM) "
        "when it has done twice as many more.",
    )
    control_frames_per_s: int = declare(
        100,
        Whole(1, 1_000_000),
        "PING, SETTINGS and the like a second, beyond what answers bring about; the connection is closed "
        "when there were ten times as many more.",
    )
