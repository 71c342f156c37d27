"""cli.py: what options may be, what is said of mistakes, and files that are never half there."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import cli
from cli import option

PROGRAM = """
import sys
sys.path.insert(0, {root!r})
import cli
def main():
    {body}
cli.run(main)
"""


@dataclass
class Options:
    words: tuple[str, ...] = option((), "what to say", positional=True)
    steps: int = option(50, "100% of them", low=1, high=1000)
    scale: float | None = option(None, "or what the model says")
    rate: float = option(1.0, above=0)
    size: tuple[int, int] = option((64, 64), metavar="WxH", read=cli.read_size)
    values: tuple[int, ...] = option((1, 2), low=1)
    mix: dict = option({"a": 1})
    kind: str = option("one", choices=("", "one", "two"))
    also: tuple[str, ...] = option((), "more words", repeat=True)
    loud: bool = option(False, "say it loudly")
    deep: bool = option(True)


@pytest.mark.parametrize("line, expected", [
    ("", Options()),
    ("a b --steps 3 c", Options(words=("a", "b", "c"), steps=3)),
    ("--scale=2", Options(scale=2.0)),
    ("--scale -2.5", Options(scale=-2.5)),
    ("--size 512x320", Options(size=(512, 320))),
    ("--values 4,8", Options(values=(4, 8))),
    ("--values 4", Options(values=(4,))),
    ("--values=[4,8]", Options(values=(4, 8))),
    ("--mix {'b':2}", Options(mix={"b": 2})),
    ("--also a,b x --also=c y --also a:2", Options(words=("x", "y"), also=("a,b", "c", "a:2"))),
    ("--loud a", Options(words=("a",), loud=True)),
    ("--loud=True --deep=False", Options(loud=True, deep=False)),
    ("--loud=true --deep=FALSE", Options(loud=True, deep=False)),
    ("a --deep false --loud True b", Options(words=("a", "b"), loud=True, deep=False)),
    ("--steps 1_000", Options(steps=1000)),
    ("--kind two", Options(kind="two")),
])
def test_command_lines(line, expected):
    assert cli.parse(Options, "", line.split()) == expected


@pytest.mark.parametrize("line, says", [
    ("--steps 0", "steps must be in 1..1000, got 0"),
    ("--steps 1.5", "--steps: must be a whole number, got '1.5'"),
    ("--steps many", "--steps: must be a whole number, got 'many'"),
    ("--steps", "--steps: expected one argument"),
    ("--rate 0", "rate must be > 0, got 0"),
    ("--rate 1e999", "rate must be a finite number, got inf"),
    ("--scale nan", "--scale: must be a number, got 'nan'"),
    ("--size 512", "--size: must be WIDTHxHEIGHT, like 256x256, got '512'"),
    ("--values 3,0", "values must be >= 1, got 0"),
    ("--values 3,x", "--values: must be a tuple of whole numbers, got '3,x'"),
    ("--scale 1e400", "scale must be a finite number, got inf"),
    ("--scale " + "9" * 400, "scale must fit into 64 bits, got a number of 1329 bits"),
    ("--steps 0x" + "f" * 9000, "steps must be in 1..1000, got a number of 36000 bits"),
    ("--size " + "9" * 5000 + "x1", "--size: must be WIDTHxHEIGHT"),
    ("--size 64X64", "--size: must be WIDTHxHEIGHT, like 256x256, got '64X64'"),
    ("--deep=1", "--deep: must be True or False, got '1'"),
    ("--kind three", "kind must be one of one, two, got 'three'"),
    ("--loud=maybe", "--loud: must be True or False, got 'maybe'"),
    ("--step 3", "no option 'step'; did you mean 'steps'?"),
    ("--words x", "words is given by itself, without --words"),
    ("--word x", "no option 'word' (see --help)"),
    ("--xyzzy", "no option 'xyzzy' (see --help)"),
])
def test_mistakes_say_what_and_where(line, says):
    with pytest.raises(ValueError) as refusal:
        cli.parse(Options, "", line.split())
    assert says in str(refusal.value)


def test_help_says_what_every_option_is(capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(Options, "Says words.", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert "Says words." in text and "100% of them; default 50" in text and "one of one, two" in text
    assert cli.help_of({"help": "a seed"}, 0) == "a seed; default 0" and "{}" not in cli.help_of({}, {})


@given(st.one_of(st.integers(), st.floats(), st.text(), st.booleans(), st.none(), st.tuples(st.integers())))
def test_check_lets_through_what_fits_and_nothing_else(value):
    options = Options()
    options.steps = value
    if type(value) is int and 1 <= value <= 1000:
        cli.check(options)
    else:
        with pytest.raises(ValueError, match="^steps must be"):
            cli.check(options)


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def program(body, **options):
    return subprocess.run([sys.executable, "-c", PROGRAM.format(root=ROOT, body=body)], capture_output=True, text=True,
                          **options)


@pytest.mark.parametrize("body, says", [
    ("cli.read_size('x')", "must be WIDTHxHEIGHT"),
    ("open('/no/such/file')", "/no/such/file: No such file or directory"),
    ("open('/')", "/: Is a directory"),
    ("cli.write_text('/no/such/folder/file', '')", "/no/such/folder/file cannot be written: No such file or directory"),
])
def test_a_mistake_is_one_line_and_status_2(body, says):
    done = program(body)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1


def test_a_terminal_that_cannot_show_a_path_is_no_error():
    for encoding in ("ascii", "cp1252", "utf-8"):
        done = program(r"print('\u7ea2 \udcff.mp4')", env=os.environ | {"PYTHONIOENCODING": encoding})
        assert done.returncode == 0 and done.stdout in ("\\u7ea2 \\udcff.mp4\n", "\u7ea2 \\udcff.mp4\n")


@pytest.mark.parametrize("body, says", [
    ("[][0]", "IndexError"), ("import json; json.loads('{')", "json.decoder.JSONDecodeError"),
    ("import numpy; numpy.zeros(3).reshape(2, 2)", "ValueError: cannot reshape"), ("int('x')", "ValueError: invalid"),
])
def test_a_bug_keeps_its_traceback(body, says):
    done = program(body)
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and says in done.stderr


def test_a_reader_that_has_enough_is_no_error():
    code = PROGRAM.format(root=ROOT, body="print('line\\n' * 100_000)")  # more than a pipe holds
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=60) == 0


def test_interrupts_leave_without_a_traceback():
    # short sleeps: Python takes note of a signal that comes in the moment in which it falls asleep when it wakes up
    body = "import time; print('on', flush=True)\n    while True: time.sleep(0.1)"
    code = PROGRAM.format(root=ROOT, body=body)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == ""


def test_commands_run_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "sample.py"), "--frames", "7", "x"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == (
        "sample.py: frames must make a grid, got 7, which is prime: use 6 or 8\n")


# ---------------------------------------------------------------------------------------------------------------------
# Text that people wrote


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])).filter(lambda s: s[:1] != "\ufeff"),
       st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_text_is_read_as_its_byte_order_mark_says(text, encoding):
    assert cli.decode(text.encode(encoding), "list.csv") == text


@pytest.mark.parametrize("data, line", [
    (b"a\nb \x92s", 2), (b"\xff\xfea\0\n\0\0\xd8", 2), (b"\xff", 1), (b"a\n\nb\0", 3),
    ("a cat".encode("utf-16-le"), 1), (b"\xef\xbb\xbf\n\xe9", 2)])
def test_what_is_no_text_is_told_with_its_line(data, line):
    with pytest.raises(ValueError, match=rf"^list.csv, line {line}: not text in UTF-8; save it as UTF-8$"):
        cli.decode(data, "list.csv")


@given(st.binary())
def test_bytes_are_text_or_refused(data):
    try:
        assert "\ufffd" not in cli.decode(data, "x") or b"\xef\xbf\xbd" in data or data[:1] in (b"\xff", b"\xfe")
    except ValueError as error:
        assert "not text" in str(error)


def test_json_is_read_or_refused_with_its_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes('{"a": "é"}'.encode("utf-8-sig"))
    assert cli.read_json(path) == {"a": "é"}
    for text, said in (('{\n"a": 1,\n', "line 3: not JSON"), ("[" * 100_000, "not JSON that can be read"),
                       ("9" * 5000, "not JSON that can be read"), ("", "line 1: not JSON")):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            cli.read_json(path)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_a_file_is_whole_or_not_there(tmp_path):
    path = str(tmp_path / "file")
    cli.write_text(path, "before")
    with pytest.raises(KeyError), cli.beside(path) as part:
        with open(part, "w") as file:
            file.write("half")
        raise KeyError
    assert open(path).read() == "before" and os.listdir(tmp_path) == ["file"]
    cli.write_text(path, "after")
    assert open(path).read() == "after" and os.listdir(tmp_path) == ["file"]


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path):
    for mask, mode in (("022", "644"), ("077", "600"), ("002", "664")):
        code = ("import sys; sys.path.insert(0, sys.argv[1]); import cli, os\nwith cli.beside(sys.argv[2]) as part:"
                " os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))")
        shell = ["sh", "-c", f'umask {mask}; exec "$@"', "sh"]
        subprocess.run([*shell, sys.executable, "-c", code, ROOT, tmp_path / mask], check=True)
        assert f"{os.stat(tmp_path / mask).st_mode & 0o777:o}" == mode


def test_a_command_may_be_started_without_a_standard_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as `>&-` leaves it, and pythonw on Windows
    cli.run(lambda: None)
