"""What every command needs: options from the fields of a dataclass, errors for people, files that are never half there.

    @dataclass
    class Options:
        video: str = option("", "list of clips", positional=True)
        steps: int = option(50, "sampling steps", low=1, high=1000)

    def main():
        options = parse(Options, __doc__)

    if __name__ == "__main__":
        run(main)

The library raises ordinary exceptions, ValueError and OSError, with a text for its user; `run` makes one line of them.
"""

import argparse
import ast
import codecs
import dataclasses
import difflib
import io
import json
import math
import os
import re
import sys
import traceback
import types
import typing
from contextlib import contextmanager, suppress

ROOT = os.path.dirname(os.path.abspath(__file__))  # of the repository

# ---------------------------------------------------------------------------------------------------------------------
# Options: a field says its help and its range, `check` holds it to them, `parse` reads the command line


def option(default, help="", *, low=None, high=None, above=None, choices=None, positional=False, repeat=False,
           metavar=None, read=None):
    """A field of an options dataclass: its default, what --help says of it, and what it may be.

    low, high   the least and the greatest number, `above` the number that it must exceed; of a tuple, for every item
    choices     the values that are known
    positional  given without its name; a tuple takes all that are given
    repeat      a tuple of texts, each given with the name before it
    read        text -> value, raising ValueError, where the type alone does not say how to read it
    """
    about = {"help": help, "low": low, "high": high, "above": above, "choices": choices, "positional": positional,
             "repeat": repeat, "metavar": metavar, "read": read}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=about)
    return dataclasses.field(default=default, metadata=about)


def check(options):
    """Raise ValueError where a field of an options dataclass has another type than it says, or is out of its range."""
    kinds = typing.get_type_hints(type(options))
    for f in dataclasses.fields(options):
        value, kind = getattr(options, f.name), kinds[f.name]
        if not fits(value, kind):
            raise ValueError(f"{f.name} must be {called(kind)}, got {value!r}")
        choices = f.metadata.get("choices")
        if any("\0" in text for text in (value if isinstance(value, tuple) else (value,)) if isinstance(text, str)):
            raise ValueError(f"{f.name} must be text without zero bytes, got {value!r}")
        if choices is not None and value is not None and value not in choices:
            known = ", ".join(str(choice) for choice in choices if choice not in ("", None))
            raise ValueError(f"{f.name} must be one of {known}, got {value!r}")
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, (int, float)):
                check_number(f.name, item, **{k: f.metadata.get(k) for k in ("low", "high", "above")})


def check_number(name: str, number, low=None, high=None, above=None):
    """Raise ValueError unless a number is finite and within its range."""
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {number}")
    if low is not None and high is not None and not low <= number <= high:
        raise ValueError(f"{name} must be in {shown(low)}..{shown(high)}, got {shown(number)}")
    for sign, limit, good in ((">=", low, low is None or number >= low), ("<=", high, high is None or number <= high),
                              (">", above, above is None or number > above)):
        if not good:
            raise ValueError(f"{name} must be {sign} {shown(limit)}, got {shown(number)}")
    if isinstance(number, int) and not -(2**63) <= number < 2**64:
        raise ValueError(f"{name} must fit into 64 bits, got {shown(number)}")


def shown(number) -> str:
    if isinstance(number, int) and number.bit_length() > 99:  # Python refuses to print one of 5,000 digits
        return f"a number of {number.bit_length()} bits"
    return f"{number:g}" if isinstance(number, float) else str(number)


def fits(value, kind) -> bool:
    """Whether a value is of a type: bool, int, float, str, dict, tuple[...], or one of several (A | B | None)."""
    if isinstance(kind, types.UnionType):
        return any(fits(value, k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        of, *more = typing.get_args(kind)
        count = isinstance(value, tuple) and (more == [...] or len(value) == 1 + len(more))
        return count and all(fits(item, of) for item in value)
    return type(value) in (int, float) if kind is float else type(value) is kind


def called(kind) -> str:
    """The name of a type in a message."""
    names = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
    if isinstance(kind, types.UnionType):  # None only stands for "not given"
        return " or ".join(called(k) for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        of, *more = typing.get_args(kind)
        each = called(of).removeprefix("a ") + ("s" if called(of).startswith("a ") else "")
        return f"a tuple of {each}" if more == [...] else f"{1 + len(more)} {each}"
    return names.get(kind, kind.__name__)


def read_value(text: str, f: dataclasses.Field, kind):
    """The value that a text on the command line stands for: as it is, or a Python literal. Raises ValueError."""
    if f.metadata.get("read"):
        return f.metadata["read"](text)
    if fits(text, kind):
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    for shape in (shaped(value, kind), (value,)):  # --fps 8 is as good as --fps 8,
        if fits(shape, kind):
            return shape
    raise ValueError(f"must be {called(kind)}, got {text!r}")


def read_fields(kind, texts: dict) -> dict:
    """Options of a dataclass from the fields of a form: texts as read_value reads them, and switches; what is empty is
    not given. Raises ValueError, beginning with the name of the field."""
    about, hints, said = {f.name: f for f in dataclasses.fields(kind)}, typing.get_type_hints(kind), {}
    for name, value in texts.items():
        if value not in (None, "", False):
            try:
                said[name] = read_value(str(value), about[name], hints[name]) if isinstance(value, str) else value
            except ValueError as error:
                raise ValueError(f"{name} {error}") from error
    return said


def as_text(name: str, value):
    """The value of an option as `read_fields` takes it."""
    if isinstance(value, dict):
        return "; ".join(f"{key}: {text}" for key, text in value.items())
    if isinstance(value, tuple):
        return ("x" if name == "size" else ",").join(map(str, value))
    return value if isinstance(value, bool) else "" if value is None else shown(value)


def shaped(value, kind):
    """A literal as an option of a type holds it: lists become tuples, whole numbers floats where those are wanted."""
    if isinstance(value, list):
        return tuple(value)
    wants_float = kind is float or kind == float | None
    return float(value) if type(value) is int and wants_float and abs(value) < 2**1000 else value


def read_size(text: str) -> tuple[int, int]:
    """ "512x320" -> (512, 320): width, height. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text)
    if not match:
        raise ValueError(f"must be WIDTHxHEIGHT, like 256x256, got {text!r}")
    return int(match[1]), int(match[2])


# ---------------------------------------------------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as ValueError."""

    def error(self, message):
        raise ValueError(f"{message} (see --help)")


def parse(kind, description: str, argv=None, **defaults):
    """An instance of an options dataclass from a command line (default: sys.argv), checked.

    Every `option` is `--name VALUE` or `--name=VALUE`, one of type bool also `--name` alone; other fields are for the
    library alone. `defaults` go before those of the fields. Raises ValueError, with the nearest name for one that is
    unknown.
    """
    hints = typing.get_type_hints(kind)
    parser = Parser(prog=program(), description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in filter(lambda f: f.metadata, dataclasses.fields(kind)):
        add_option(parser, f, hints[f.name])
    switches = {f"--{name}" for name, hint in hints.items() if hint is bool}
    words, left = [], list(sys.argv[1:] if argv is None else argv)
    while left:
        words.append(left.pop(0))
        if words[-1] in switches:
            words[-1] += "=" + (left.pop(0) if left and left[0].lower() in ("true", "false") else "True")
    given, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        raise ValueError(unknown_option(unknown[0].partition("=")[0].removeprefix("--"), kind))
    options = kind(**(defaults | vars(given)))
    check(options)
    return options


def unknown_option(name: str, kind) -> str:
    """The message about an option that a dataclass does not have."""
    by_itself = [f.name for f in dataclasses.fields(kind) if f.metadata.get("positional")]
    if name in by_itself:
        return f"{name} is given by itself, without --{name}"
    near = difflib.get_close_matches(name, [f.name for f in dataclasses.fields(kind) if f.name not in by_itself], n=1)
    return f"there is no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else " (see --help)")


def add_option(parser: Parser, f: dataclasses.Field, kind):
    """Add the option of a field. One that is not given is not in what argparse returns: the dataclass fills it in."""
    about, default = f.metadata, f.default if f.default is not dataclasses.MISSING else f.default_factory()
    metavar = about.get("metavar") or ("[BOOL]" if kind is bool else f.name.upper())
    named = {"help": help_of(about, default).replace("%", "%%"), "metavar": metavar}

    def read(text):
        try:
            return read_value(text, f, kind)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    if about.get("repeat"):
        parser.add_argument(f"--{f.name}", action=Gather, default=argparse.SUPPRESS, **named)
    elif not about.get("positional"):
        parser.add_argument(f"--{f.name}", type=read, default=argparse.SUPPRESS, **named)
    elif typing.get_origin(kind) is tuple:
        parser.add_argument(f.name, nargs="*", action=Gather, default=argparse.SUPPRESS, **named)
    else:
        nargs = None if default is None else "?"
        parser.add_argument(f.name, nargs=nargs, type=read, default=argparse.SUPPRESS, **named)


def help_of(about, default) -> str:
    """What --help says of an option: what it is, what it may be, and what it is when it is not given."""
    known = [str(choice) for choice in about.get("choices") or () if choice]
    if isinstance(default, tuple):
        default = ("x" if about.get("read") is read_size else ",").join(map(str, default))
    given = [f"default {default}"] if default not in (None, "", {}) and default is not False else []
    return "; ".join([about.get("help", "")] + ([f"one of {', '.join(known)}"] if known else []) + given)


class Gather(argparse.Action):
    """All that are given, as a tuple."""

    def __call__(self, parser, namespace, values, option_string=None):
        if option_string:
            setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), values))
        elif values:
            setattr(namespace, self.dest, tuple(values))


def program() -> str:
    """What was started, as a user calls it: sample.py, or lab.evals.fvd."""
    name = os.path.relpath(os.path.abspath(sys.argv[0]), ROOT)
    if os.sep not in name:
        return name
    return os.path.splitext(name)[0].removesuffix(f"{os.sep}__main__").replace(os.sep, ".")


# ---------------------------------------------------------------------------------------------------------------------
# Errors are for people


def run(main):
    """Run a command: a mistake of its user becomes one line on stderr and status 2, a bug keeps its traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may be unable to show a path; stderr is so from the start
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        print(end="", flush=True)  # there may be no sys.stdout
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        if not is_ours(error):
            raise
        print(f"{program()}: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def is_ours(error: Exception) -> bool:
    """Whether an error is about what the user gave: the system's, or one that a `raise` in this repository says."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    said = (last.line or "").startswith("raise ") and os.path.abspath(last.filename).startswith(ROOT + os.sep)
    return said or isinstance(error, OSError)


def one_line(error: Exception) -> str:
    """The first line of what an error says, with the file that it is about."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error).strip().split("\n")[0] or type(error).__name__


def warn(text: str):
    print(f"warning: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Text that people wrote

MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


def read_text(path: str) -> str:
    """The text of a file, see `decode`. Raises ValueError where it is no text, and OSError."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} must be a file, got a folder or a device")  # to read a pipe is to wait for ever
    with open(path, "rb") as file:
        return decode(file.read(), path)


def decode(data: bytes, path: str) -> str:
    """Bytes of a file as text, in UTF-8 or in what its byte order mark says.

    Raises ValueError, naming the line, on anything else: another encoding would be a guess, and train on nonsense.
    """
    mark = next(filter(data.startswith, MARKS), b"")
    data, encoding = data[len(mark) :], MARKS.get(mark, "utf-8")
    try:
        text = data.decode(encoding)
        wrong = text.find("\0")
        if wrong < 0:
            return text
        before = text[:wrong]
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(encoding, errors="replace")
    raise ValueError(f"{path}, line {before.count(chr(10)) + 1}: not text in UTF-8; save it as UTF-8")


def read_json(path: str):
    """What a JSON file holds. Raises ValueError, naming the line, where it is none, and OSError."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets in brackets
        raise ValueError(f"{path}: not JSON that can be read: {one_line(error)}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Files that are never half there

UMASK = os.umask(0)  # to read it is to set it: done once, before there are threads
os.umask(UMASK)


@contextmanager
def beside(path: str):
    """Context manager: the path to write to instead, renamed into place at the end, removed on an error.

    Raises OSError, naming `path`, when it cannot be written; what was there before stays whole.
    """
    part = f"{path}.part"
    try:
        yield part
        if os.path.isfile(part):
            os.chmod(part, 0o666 & ~UMASK)  # safetensors makes files that nobody else may read
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            os.remove(part)


def write_text(path: str, text: str):
    """Write a text file, in UTF-8."""
    with beside(path) as part, open(part, "w", encoding="utf-8") as file:
        file.write(text)


def check_writable(path: str):
    """Raise OSError when a file cannot be written: better before the work than after it."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with beside(path + ".try") as part, open(part, "wb"):
        pass
    os.remove(path + ".try")
