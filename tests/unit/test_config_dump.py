"""Secrets of a configuration, its dump, and the lines of its keys."""

from dataclasses import fields

import pytest
import tomli

from tests.support.configured import ENVIRON, SECRET, Write, load_config
from worker_svc.config import Config, Variables, load
from worker_svc.config.toml_lines import key_lines

# Secrets, and the dump


def test_values_of_variables_never_show(write_config: Write) -> None:
    loaded = load(write_config(f"[jobs]\nenv = {{ TOKEN = '{SECRET}', 'o dd' = '' }}"), environ=ENVIRON)
    assert loaded.config.jobs.env["TOKEN"] == SECRET
    for shown in (repr(loaded), str(loaded.config.jobs.env), loaded.dump()):
        assert SECRET not in shown
        assert "TOKEN" in shown
    assert 'env = { TOKEN = "(hidden)", "o dd" = "(hidden)" }' in loaded.dump()


def test_variables_are_a_hashable_mapping() -> None:
    assert Variables({"A": "1"}) == Variables({"A": "1"}) != Variables({"A": "2"})
    assert len({Variables({"A": "1", "B": "2"}), Variables({"B": "2", "A": "1"})}) == 1
    given = {"A": "1"}
    variables = Variables(given)
    given["A"] = "2"
    assert variables == {"A": "1"}


def test_dump_is_a_file_that_means_the_same(write_config: Write) -> None:
    text = (
        "[jobs]\nstop_signal = '40'\ncwd = 'a \"b\" é'\npass_env = []\ntimeout_s = 1e7\n"
        "[grpc_server]\naddr = '[::1]:0'\n[log]\nfile = \"x\\ty\""
    )
    loaded = load(write_config(text), environ=ENVIRON)
    dumped = loaded.dump()
    assert 'addr = "[::1]:0"                          # ../conf/worker.toml:7\n' in dumped
    assert load_config(write_config(dumped), environ={}) == loaded.config
    assert [line for line in dumped.splitlines() if line.startswith("[")] == [
        f"[{section.name}]" for section in fields(Config)
    ]


# Lines of keys


TRICKY = '''\
# [jobs] in a comment
top = 1
[ jobs . "env" ]  # a header with blanks
"a.b" = "x" # = not a key
'c' = """
[log]
level = "not a key"
\\""" still the string """""
d = \'\'\'
[state]'\'\'\'\'
[jobs]
pass_env = [ # comment with ] and "
  "A]",
  'B"', """
]""", [ { x = 1 } ],
]
dotted . slots = 0x1F
when = 1979-05-27 07:32:00
inline = { a = { b = 1, "c" = [1, 2] }, d = "}" }
"q\\u0075oted" = {}
[[things]]
n = 1
[[things]]
n = 2
[last]
k = "\\"#"
'''


def test_lines_of_keys_in_a_tricky_document() -> None:
    tomli.loads(TRICKY)
    assert key_lines(TRICKY) == {
        ("top",): 2,
        ("jobs",): 3,
        ("jobs", "env"): 3,
        ("jobs", "env", "a.b"): 4,
        ("jobs", "env", "c"): 5,
        ("jobs", "env", "d"): 9,
        ("jobs", "pass_env"): 12,
        ("jobs", "dotted"): 17,
        ("jobs", "dotted", "slots"): 17,
        ("jobs", "when"): 18,
        ("jobs", "inline"): 19,
        ("jobs", "inline", "a"): 19,
        ("jobs", "inline", "d"): 19,
        ("jobs", "quoted"): 20,
        ("things",): 21,
        ("things", "n"): 22,
        ("last",): 25,
        ("last", "k"): 26,
    }


@pytest.mark.parametrize(
    "text,path,line",
    [
        ("jobs.slots = 1", ("jobs", "slots"), 1),
        ("\n\njobs = { queue_length = 2, slots = 1 }", ("jobs", "slots"), 3),
        ("'jobs'.\"slots\" = 1", ("jobs", "slots"), 1),
        ("[jobs]\n\t slots\t=\t1", ("jobs", "slots"), 2),
        ("[a]\nb = ''''''\n[jobs]\nslots=1", ("jobs", "slots"), 4),
        ("[a]\nb = [[], ['''\n]'''], {c = '}'}]\n[jobs]\nslots=1", ("jobs", "slots"), 5),
        ("a.b.c.d.e = {f = '='}\n[jobs]\nslots=1", ("jobs", "slots"), 3),
        ("a = [{b = 1}, {c = {d = 2}}]\n[jobs]\nslots=1", ("jobs", "slots"), 3),
        ("a = []\nb = {}\n[jobs]\n#\nslots=1", ("jobs", "slots"), 5),
    ],
)
def test_line_of_a_key(text: str, path: tuple[str, ...], line: int) -> None:
    tomli.loads(text)
    assert key_lines(text)[path] == line
