"""From the file, the environment and flags to a `Config`; everything that is wrong is said at once."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tomli

from worker_svc.config.declare import Section
from worker_svc.config.errors import ConfigError, Fault, Invalid, Problem, did_you_mean
from worker_svc.config.keys import Key, keys, section_types
from worker_svc.config.kinds import Place
from worker_svc.config.sections import Config
from worker_svc.config.toml_lines import key_lines
from worker_svc.config.values import show_type, toml_key, toml_value

CONFIG_VARIABLE = "WORKER_SVC_CONFIG"
"""Names the file when none is given."""
DEFAULT_FILE = Path("worker.toml")
"""Read from the current directory when it is there and no other file is named."""
MAX_FILE_BYTES = 1 << 20

_VARIABLE_PREFIX = "WORKER_SVC_"
_PAIR_COLUMNS = 40
# What Kubernetes puts into each pod beside a Service called worker-svc, or worker-svc-SOMETHING
# (https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables).
_SERVICE_LINK = re.compile(
    r"WORKER_SVC_(?:[A-Z0-9_]+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_[A-Z0-9_]+)?|PORT_[0-9]+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)",
    re.ASCII,
)
_SERVICE_LINK_URL = re.compile(r"(?:tcp|udp|sctp)://.+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Setting:
    """One effective value: as TOML (secrets hidden), and where it is from.

    `source` is `worker.toml:12`, the name of a variable, a flag, or "default".
    """

    key: Key
    toml: str
    source: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, and where each of its values came from."""

    config: Config
    settings: tuple[Setting, ...]

    def dump(self) -> str:
        """All of it as TOML, each value with its source in a comment; the values of jobs.env are hidden."""
        lines: list[str] = []
        section = ""
        for setting in self.settings:
            if setting.key.section != section:
                section = setting.key.section
                lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
            pair = f"{setting.key.name} = {setting.toml}"
            lines.append(f"{pair:<{_PAIR_COLUMNS}}  # {setting.source}")
        return "\n".join(lines) + "\n"


def load(path: Path | None, *, environ: Mapping[str, str], overrides: Mapping[str, str] = {}) -> Loaded:
    """Read, merge and check the configuration: flag over environment over file over default.

    Args:
        path: the file. None: the one that WORKER_SVC_CONFIG names, else ./worker.toml if it is there, else
            defaults only.
        environ: WORKER_SVC_<SECTION>_<KEY> variables override the file; HOME and the like give the default
            state directory.
        overrides: from flags, by dotted key: {"jobs.slots": "8"}.

    A table or list given in one place replaces the one of the place below as a whole. Relative paths are
    relative to the file they stand in; in variables and flags, and without a file, to the current directory.

    Raises:
        ConfigError: with all problems found.
    """
    try:
        cwd = Path.cwd()
    except OSError as error:
        problem = Problem("current directory", None, "", f"cannot be found: {error.strerror}")
        raise ConfigError([problem]) from error
    file, problems = _open(path, cwd, environ)
    layers = _Layers(Place(file.base, cwd, environ), dict.fromkeys(problems))
    layers.take_file(file)
    layers.take_environment()
    layers.take_flags(overrides)
    # What can't be read may hold the value that is missing, or the other half of a conflict.
    if not problems:
        layers.take_defaults()
        layers.check_conflicts()
    if layers.problems:
        raise ConfigError(layers.problems)
    return layers.loaded()


@dataclass
class _File:
    """A file as read; without one, an empty one in the current directory."""

    name: str
    base: Path
    text: str = ""
    table: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def lines(self) -> Mapping[tuple[str, ...], int]:
        return key_lines(self.text)

    def line(self, *path: str) -> int | None:
        """The line of a key, or of the nearest thing around it that has one."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return None


def _open(path: Path | None, cwd: Path, environ: Mapping[str, str]) -> tuple[_File, list[Problem]]:
    """The file to use and what is wrong with it as a whole."""
    named_by = ""
    if path is None and environ.get(CONFIG_VARIABLE):
        path = Path(environ[CONFIG_VARIABLE])
        named_by = f" ({CONFIG_VARIABLE} names it)"
    name = str(path or DEFAULT_FILE)
    file = _File(name, (cwd / name).parent)

    def failed(text: str, line: int | None = None) -> tuple[_File, list[Problem]]:
        return file, [Problem(name, line, "", text)]

    try:
        with open(name, "rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        if path is None and isinstance(error, FileNotFoundError):
            return file, []
        # ValueError: the name contains NUL.
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return failed(f"cannot be read: {reason}{named_by}")
    if len(data) > MAX_FILE_BYTES:
        return failed(f"is larger than {MAX_FILE_BYTES // 1024} KiB{named_by}")
    try:
        # Editors on Windows begin files with a byte order mark, which utf-8-sig drops.
        file.text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return failed(f"is not UTF-8: byte 0x{error.object[error.start]:02x}", line)
    try:
        file.table = tomli.loads(file.text)
    except tomli.TOMLDecodeError as error:
        return failed(f"column {error.colno}: {error.msg}", error.lineno)
    except RecursionError:
        return failed("is nested too deeply")
    except ValueError as error:
        # Python's own refusal of integers with thousands of digits passes through tomli as it is.
        return failed("is not valid TOML: " + str(error).partition(";")[0])
    return file, []


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a value is from: its `name` there, what `source` to report, and for files the lines."""

    source: str
    name: str
    place: Place
    file: _File | None = None
    path: tuple[str, ...] = ()

    def problem(self, fault: Fault) -> Problem:
        if self.file:
            name = ".".join(toml_key(part) for part in (*self.path, *fault.below))
            return Problem(self.source, self.file.line(*self.path, *fault.below), name, fault.text)
        below = "".join(f"{toml_key(part)}: " for part in fault.below)
        return Problem(self.source, None, self.name, below + fault.text)

    def __str__(self) -> str:
        return f"{self.source}:{self.file.line(*self.path)}" if self.file else self.name


def _nearest_key(section: str, name: str) -> str:
    """Which key may have been meant: one like it in the section, else the same name in another section."""
    if near := did_you_mean(name, [key.name for key in keys() if key.section == section]):
        return near
    elsewhere = [key.path for key in keys() if key.name == name]
    return f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else ""


def _is_service_link(name: str, text: str) -> bool:
    """Whether a variable is nobody's who configures us, though its name begins as ours do."""
    is_url = name.endswith("_PORT") and _SERVICE_LINK_URL.fullmatch(text) is not None
    return is_url or _SERVICE_LINK.fullmatch(name) is not None


class _Layers:
    """The values taken in so far, by key; a later layer overrides an earlier one."""

    def __init__(self, defaults: Place, problems: dict[Problem, None]) -> None:
        self.problems = problems
        """A dict for its order and for saying nothing twice."""
        self._default_origin = _Origin("", "default", defaults)
        self._outside = Place(defaults.cwd, defaults.cwd, defaults.environ)
        self._values: dict[Key, object] = {}
        self._origins: dict[Key, _Origin] = {}
        self._refused: set[Key] = set()
        self._by_path = {key.path: key for key in keys()}

    def take_file(self, file: _File) -> None:
        place = Place(file.base, self._outside.cwd, self._outside.environ)
        for section, table in file.table.items():
            if section not in section_types():
                self._unknown_section(file, section, table)
            elif not isinstance(table, dict):
                text = f"must be a section, written [{section}], not {show_type(table)}"
                self._report(Problem(file.name, file.line(section), section, text))
            else:
                for name, raw in table.items():
                    origin = _Origin(file.name, "", place, file, (section, name))
                    if key := self._by_path.get(f"{section}.{name}"):
                        self._take(key, key.kind.from_toml, raw, origin)
                    else:
                        self._report(origin.problem(Fault(f"unknown key{_nearest_key(section, name)}")))

    def _unknown_section(self, file: _File, section: str, table: object) -> None:
        if isinstance(table, dict):
            text = "unknown section" + did_you_mean(section, section_types())
        else:
            text = "unknown key; every key belongs in a section" + _nearest_key("", section)
        self._report(Problem(file.name, file.line(section), toml_key(section), text))

    def take_environment(self) -> None:
        known = {key.variable: key for key in keys()}
        for name, text in sorted(self._outside.environ.items()):
            if not name.startswith(_VARIABLE_PREFIX) or name == CONFIG_VARIABLE:
                continue
            origin = _Origin("environment", name, self._outside)
            if key := known.get(name):
                self._take_text(key, text, origin)
            elif not _is_service_link(name, text):
                text = "unknown variable" + did_you_mean(name, [*known, CONFIG_VARIABLE])
                self._report(origin.problem(Fault(text)))

    def take_flags(self, overrides: Mapping[str, str]) -> None:
        for path, text in overrides.items():
            if key := self._by_path.get(path):
                self._take_text(key, text, _Origin("", key.flag, self._outside))
            else:
                self._report(Problem("", None, path, "unknown key" + did_you_mean(path, self._by_path)))

    def take_defaults(self) -> None:
        for key in keys():
            if key not in self._origins and key not in self._refused:
                origin = _Origin("", key.path, self._default_origin.place)
                self._take(key, key.kind.from_toml, key.default, origin)
                self._origins[key] = self._default_origin

    def check_conflicts(self) -> None:
        for section, made_by in section_types().items():
            own = [key for key in keys() if key.section == section]
            # A refused value stands in with its default, so that the conflicts of the others are still found.
            values = {key.name: self._values.get(key, key.kind.from_toml(key.default)) for key in own}
            made: Section = made_by(**values)
            for names, text in made.conflicts():
                involved = [self._by_path[f"{section}.{name}"] for name in names]
                if self._refused.isdisjoint(involved):
                    # A default is never to blame for what was set beside it.
                    origins = [self._origins[key] for key in involved]
                    blamed = next(origin for origin in origins if origin is not self._default_origin)
                    self._report(blamed.problem(Fault(text)))

    def loaded(self) -> Loaded:
        sections = {
            section: made_by(**{key.name: self._values[key] for key in keys() if key.section == section})
            for section, made_by in section_types().items()
        }
        settings = (Setting(key, toml_value(self._values[key]), str(self._origins[key])) for key in keys())
        return Loaded(Config(**sections), tuple(settings))

    def _take_text(self, key: Key, text: str, origin: _Origin) -> None:
        # Python decodes a byte that is not UTF-8 to a lone surrogate; gRPC, SQLite and JSON would choke.
        if any("\ud800" <= char <= "\udfff" for char in text):
            self._refused.add(key)
            self._report(origin.problem(Fault("is not UTF-8")))
        else:
            self._take(key, key.kind.from_text, text, origin)

    def _take(self, key: Key, parse: Callable[[Any], object], raw: object, origin: _Origin) -> None:
        try:
            self._values[key] = key.kind.resolve(parse(raw), origin.place)
            self._origins[key] = origin
        except Invalid as error:
            self._refused.add(key)
            for fault in error.faults:
                self._report(origin.problem(fault))

    def _report(self, problem: Problem) -> None:
        self.problems[problem] = None
