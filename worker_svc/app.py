"""Builds the worker from its configuration, serves until it is asked to leave, and leaves jobs to the supervisor."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sqlite3
import ssl
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from worker_svc import __version__
from worker_svc.access import startchecks
from worker_svc.access.policy import base_env
from worker_svc.access.roles import Doorkeeper, Role
from worker_svc.access.tls import Reloader, SecurityError, acceptance, expiry_s, scheduler_context, server_context
from worker_svc.config import Address, Config
from worker_svc.feed import Feed
from worker_svc.ipc.messages import GetStatus, Settings, Status
from worker_svc.job import JobError
from worker_svc.link import SupervisorError, SupervisorLink, leave_no_core
from worker_svc.linux import failpoints
from worker_svc.linux.kinship import Kinship
from worker_svc.masking import Masker
from worker_svc.output import OutputReader
from worker_svc.printable import printable
from worker_svc.record.reader import StoreReader
from worker_svc.record.schema import StoreError
from worker_svc.server.sockets import close_sockets
from worker_svc.starting import StartError, bind, check_start, take_signals_as_usual, worker_lock
from worker_svc.telemetry import Log, TransitionLog, set_up_log

if TYPE_CHECKING:
    from worker_svc.pb import jobscheduler as pb
    from worker_svc.registration import Registration
    from worker_svc.server import GrpcServer
    from worker_svc.service import WorkerFacts

# Variables that tell of a user, so that another user's jobs must not find the worker's.
_OF_A_USER: Final = ("HOME", "USER", "LOGNAME", "SHELL")
_LAST_LINES_TIMEOUT_S: Final = 2.0
_DEREGISTER_TIMEOUT_S: Final = 2.0
_LAST_WORDS_TIMEOUT_S: Final = 0.2
_WARNINGS: Final = frozenset(
    {
        "supervisor.lost",
        "store.unreadable",
        "supervisor.not_found",
        "supervisor.shutting_down",
        "supervisor.silent",
        "supervisor.unavailable",
        "output.degraded",
        "output.cannot_drop_head",
        "limits.unenforceable",
    }
)


def serve(config: Config, config_file: Path | None = None, *, file_is_named: bool = True) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status. The file is the one that `config` was read from."""
    take_signals_as_usual()
    masker = Masker(config.access.secret_keys, show_arguments=config.access.show_arguments)
    try:
        log = set_up_log(config.log, masker)
    except OSError as error:
        print(printable(f"worker-svc: log.file: {error}"), file=sys.stderr, flush=True)
        return 1
    try:
        check_start(config, config_file, log.events, is_named=file_is_named)
        leave_no_core()
        return asyncio.run(_Worker(config, log, masker).run())
    except (StartError, SupervisorError, SecurityError, StoreError, sqlite3.Error, OSError) as error:
        log.events.error("worker.failed", reason=str(error))
        return 1
    finally:
        log.close()


class _Worker:
    def __init__(self, config: Config, log: Log, masker: Masker) -> None:
        self._config = config
        self._whole_log = log
        self._log = log.events
        self._masker = masker
        self._started_monotonic_s = time.monotonic()
        self._feed: Feed | None = None
        self._registration: Registration | None = None
        self._advertised = ""
        self._sequence = 0
        """The latest doorbell's: it can ring before the feed is there."""

    async def run(self) -> int:
        """Serves, and leaves. What can fail for want of an address or a file comes before anything is made."""
        config = self._config
        context, calling = server_context(config.grpc_server), scheduler_context(config.scheduler)
        sockets = await bind(config.grpc_server)
        try:
            with worker_lock(config.state.dir):
                mended = startchecks.mend_state_dir(config.state.dir)
                if mended:
                    self._log.warning("worker.mended", what=mended)
                failpoints.arm(str(config.state.dir), failpoints.WORKER_FILE_NAME)
                return await self._serve(sockets, context, calling)
        finally:
            close_sockets(config.grpc_server.addr, sockets)

    async def _serve(
        self, sockets: list[socket.socket], context: ssl.SSLContext | None, calling: ssl.SSLContext | None
    ) -> int:
        config = self._config
        link = SupervisorLink(
            config.state.dir,
            _settings(config),
            __version__,
            supervisor_options=_supervisor_options(config),
            on_sequence=self._on_sequence,
            on_event=self._on_event,
            meanwhile=_load_the_rest,
        )
        await link.connect()
        from worker_svc.access.guard import Gate
        from worker_svc.access.policy import CommandPolicy
        from worker_svc.reading import LongReads
        from worker_svc.server import GrpcServer
        from worker_svc.service import WorkerService
        from worker_svc.wire.messages.defaults import start_defaults

        await self._warn_of_limits(link)
        worker_id = link.info.state_id
        reader, reads = StoreReader(str(config.state.dir)), LongReads(str(config.state.dir))
        latest = reader.sequence()
        feed = self._feed = Feed(reader, reads, latest, lambda batch: transitions.add(batch), self._on_event)
        transitions = self._whole_log.transitions(config.state.dir, worker_id, feed.after, latest)
        feed.ring(self._sequence)
        output = OutputReader(on_degraded=lambda text: self._on_event("output.degraded", reason=text))
        doorkeeper = Doorkeeper(config.access, is_job=lambda peer: _kinship(link).is_job(peer))
        audit = self._whole_log.audit
        policy = CommandPolicy(config.policy, config.jobs, config.sandbox)
        defaults = start_defaults(config)
        service = WorkerService(
            config.state.dir,
            link,
            reader,
            reads,
            feed,
            output,
            {role.label: defaults.within(policy.bounds_of(role.label)) for role in Role},
            self._identity(),
            Gate(doorkeeper, self._masker, audit),
            policy,
        )
        server = GrpcServer(
            service,
            config.transport,
            identify=doorkeeper.rate_key,
            expiry_s=expiry_s,
            on_refused=audit.handshake_refused,
        )
        address = server.serve(config.grpc_server.addr, sockets, context)
        asked = self._take_signals()  # before anybody is told that we serve
        reloader = self._start_reloading(server)
        self._log.info("worker.serving", address=str(address), version=__version__, worker=worker_id, pid=os.getpid())
        # Whatever start-up made is here to stay: to walk it again and again would be for nothing.
        gc.freeze()
        tasks = [asyncio.create_task(lasting) for lasting in (link.run(), feed.run(), transitions.run())]
        tasks += self._start_registration(address, calling)
        status = await self._until_asked_to_leave(asked, tasks)
        self._log.info("worker.draining")
        await self._leave(server, tasks, transitions)
        reloader.close()
        reads.close()
        output.close()
        link.close()
        reader.close()
        self._log.info("worker.left")
        return status

    def _start_reloading(self, server: GrpcServer) -> Reloader:
        """Certificates are read again when their files change, and on SIGHUP, as the log is opened anew."""
        served, scheduler = self._config.grpc_server, self._config.scheduler
        files: list[Path | None] = []
        if served.use_tls:
            files += [served.crt_file, served.key_file, served.client_ca_file, served.crl_file]
        if scheduler.use_tls:
            files += [scheduler.crt_file, scheduler.key_file, scheduler.ca_file]

        def reload() -> None:
            # Modes and owners too: what was no good at the start is none now.
            errors = [found.text for found in startchecks.check_tls_files(self._config) if found.is_error]
            if errors:
                raise SecurityError("; ".join(errors))
            context, calling = server_context(served), scheduler_context(scheduler)
            leaving = server.use_context(context, acceptance(context, served.crl_file))
            if leaving:
                self._log.warning("tls.clients_refused", connections=leaving)
            if self._registration is not None:
                self._registration.use_context(calling)

        reloader = Reloader(files, reload, self._log)
        reloader.watch()

        def on_hangup() -> None:
            self._whole_log.writer.look_for_file()
            reloader.reload()

        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, on_hangup)
        return reloader

    def _start_registration(self, address: Address, context: ssl.SSLContext | None) -> list[asyncio.Task[Any]]:
        scheduler = self._config.scheduler
        advertised = self._config.grpc_server.advertise_addr or address
        if advertised.is_unspecified:
            advertised = Address(host=socket.gethostname(), port=advertised.port)
        self._advertised = str(advertised)
        if scheduler.addr is None:
            return []
        from worker_svc.registration import Registration

        self._registration = Registration(
            self._advertised,
            self._log,
            host=scheduler.addr.host,
            port=scheduler.addr.port,
            unix_path=scheduler.addr.unix_path or None,
            ssl_context=context,
            server_name=scheduler.server_name,
            register_timeout_s=scheduler.register_timeout_s,
            backoff_initial_s=scheduler.backoff_initial_s,
            backoff_max_s=scheduler.backoff_max_s,
            keepalive_s=scheduler.keepalive_s,
        )
        return [asyncio.create_task(self._registration.run())]

    def _take_signals(self) -> asyncio.Event:
        """Set by the first SIGTERM or SIGINT; the second ends the process at once."""
        loop = asyncio.get_running_loop()
        asked = asyncio.Event()

        def on_signal(number: int) -> None:
            if asked.is_set():
                self._log.warning("worker.ended_at_once", signal=signal.Signals(number).name)
                self._whole_log.close(_LAST_WORDS_TIMEOUT_S)
                os._exit(128 + number)
            self._log.info("worker.asked_to_leave", signal=signal.Signals(number).name)
            asked.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)
        return asked

    async def _until_asked_to_leave(self, asked: asyncio.Event, tasks: list[asyncio.Task[Any]]) -> int:
        """Returns the exit status: 0 when asked to, by a signal or ShutdownWorker, 1 when one of `tasks` failed."""
        waiting = asyncio.create_task(asked.wait())
        done, _ = await asyncio.wait({waiting, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        if waiting in done:
            return 0
        waiting.cancel()
        status = 0
        for task in done:
            error = task.exception()
            if error is not None:
                self._log.error("worker.failed", reason=str(error), exc_info=_unforeseen(error))
                status = 1
        return status

    async def _leave(self, server: GrpcServer, tasks: list[asyncio.Task[Any]], transitions: TransitionLog) -> None:
        if self._registration is not None:
            await self._registration.deregister(_DEREGISTER_TIMEOUT_S)
        await server.leave(self._config.grpc_server.drain_grace_s)
        await transitions.finish(_LAST_LINES_TIMEOUT_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _identity(self) -> WorkerFacts:
        from worker_svc.service import WorkerFacts

        return WorkerFacts(
            host=socket.gethostname(),
            slots=self._config.jobs.resolved_slots,
            queue_length=self._config.jobs.queue_length,
            started_monotonic_s=self._started_monotonic_s,
            advertise_address=lambda: self._advertised,
            log_state=self._log_state,
            scheduler_worker_id=lambda: self._registration.scheduler_worker_id if self._registration else "",
        )

    async def _warn_of_limits(self, link: SupervisorLink) -> None:
        try:
            status = await link.ask(GetStatus(), Status)
        except JobError:  # the supervisor is lost again: it will be found, and this is only a warning
            return
        if not status.can_drop_head:
            self._on_event(
                "output.cannot_drop_head",
                folder=str(self._config.state.dir / "output"),
                reason="its file system cannot give back the head of a file: policy drop_head is stop here",
            )
        if status.output_degraded:
            self._on_event("output.degraded", reason=status.output_degraded)
        from worker_svc.wire.messages.defaults import start_defaults

        missing = status.unenforceable
        for field, value in start_defaults(self._config).limits.limits.items():
            if field in missing:
                self._on_event("limits.unenforceable", key=f"limits.{field}", value=value, reason=missing[field])

    def _log_state(self) -> pb.LogState:
        from worker_svc.pb import jobscheduler as pb

        writer = self._whole_log.writer
        return pb.LogState(problem=writer.hindrance, held_lines=writer.held_lines, lost_lines=writer.lost_lines)

    def _on_sequence(self, sequence: int) -> None:
        self._sequence = max(self._sequence, sequence)
        if self._feed is not None:
            self._feed.ring(sequence)

    def _on_event(self, event: str, **fields: Any) -> None:
        (self._log.warning if event in _WARNINGS else self._log.info)(event, **fields)


def _load_the_rest() -> None:
    """What serving takes beyond what a supervisor does. It is as much again as all before, and a supervisor that is
    just starting takes as long: on two processors they do so side by side."""
    import worker_svc.registration
    import worker_svc.server.grpc_server
    import worker_svc.service  # noqa: F401


def _kinship(link: SupervisorLink) -> Kinship:
    """With the jobs of the supervisor that there is now."""
    return Kinship(link.info.pid, link.info.state_id, link.info.cgroup)


def _unforeseen(error: BaseException | None) -> BaseException | None:
    """What needs a traceback: all but what was raised to tell an operator something."""
    return None if isinstance(error, SupervisorError | sqlite3.Error) else error


def _settings(config: Config) -> Settings:
    """What the supervisor must know to go on without a worker."""
    jobs, kept = config.jobs, config.retention
    return Settings(
        slots=jobs.resolved_slots,
        queue_length=jobs.queue_length,
        base_env=base_env(jobs),
        user_env=tuple(name for name in jobs.pass_env if name in _OF_A_USER and name not in jobs.env),
        idle_exit_s=config.supervisor.idle_exit_s,
        min_free_bytes=config.state.min_free_bytes,
        min_free_inodes=config.state.min_free_inodes,
        keep_age_s=kept.max_age_s,
        keep_jobs=kept.max_jobs,
        keep_bytes=kept.max_bytes,
        keep_events=kept.max_events,
        keep_ids=kept.max_ids,
        on_reboot=jobs.on_reboot,
    )


def _supervisor_options(config: Config) -> list[str]:
    chosen = {"--containment": config.supervisor.containment, "--spawner": config.supervisor.spawner}
    return [word for option, value in chosen.items() if value != "auto" for word in (option, value)]
