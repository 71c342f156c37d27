"""The judge: what came of one input is a right result, a refusal in one line, or a fault."""

import ctypes
import gc
import io
import logging
import os
import re
import socket
import struct
import sys
import tempfile
import time
import traceback
import typing
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass

import cli
from clips.tars import CACHE

MEMORY = 2 << 30  # bytes that an input may take beyond what was there before
SECONDS = 30  # that it may take
PROGRESS = re.compile(r"\d+%\||it/s|s/it|\?step|^\w+ on (cpu|cuda)")  # lines of progress, and which device works
STARTS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "subprocess.Popen", "os.system", "os.exec",
          "os.posix_spawn", "os.fork", "os.startfile", "pty.spawn")
READABLE = tuple({os.path.realpath(p) + os.sep for p in (
    cli.ROOT, sys.prefix, sys.base_prefix, "/usr", "/lib", "/proc", "/sys", "/etc/ssl", "/etc/fonts",
    os.path.expanduser(CACHE), *sys.path) if p})
TEMPORARY = os.path.join(os.path.realpath(tempfile.gettempdir()), "tmp")  # how the names of temporary files begin


class Wrong(Exception):
    """A command ended with status 0, and its result is not right."""


@dataclass
class Case:
    """An input, by what its user would do with it."""

    command: typing.Callable  # () -> result
    check: typing.Callable = lambda result: None  # raises Wrong where a result is not right
    asked: bool = False  # whether the input may name files outside the folder: its user wrote it to name files
    line: str = ""  # the command line, where it is one


@dataclass
class Outcome:
    kind: str  # "right", "refused", or the kind of a fault
    what: str = ""  # the line that refuses, or what the fault is
    seconds: float = 0.0
    growth: int = 0  # bytes of memory at the peak, beyond what was there before

    @property
    def fault(self) -> bool:
        return self.kind not in ("right", "refused")


class Watch:
    """What must not be touched, and who touches it: files in a folder outside, an address, files opened, programs."""

    def __init__(self, outside: str):
        self.outside, self.inside, self.seen = outside, None, []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.setblocking(False)
        self.address = f"127.0.0.1:{self.server.getsockname()[1]}"
        libc = ctypes.CDLL(None, use_errno=True)
        self.opened = libc.inotify_init1(os.O_NONBLOCK)  # sees what C opens too, which tells Python nothing
        assert libc.inotify_add_watch(self.opened, outside.encode(), 0x20) >= 0  # IN_OPEN
        sys.addaudithook(self.audit)

    def audit(self, event, args):
        if self.inside is not None:
            if event in STARTS:
                self.seen.append(("network" if event.startswith("socket") else "program", f"{event} {args[0]!r}"))
            elif event == "open" and isinstance(args[0], str):
                self.seen.append(("open", (args[0], args[1], args[2])))

    def begin(self, inside: str):
        self.touched()
        self.seen.clear()
        self.inside = os.path.realpath(inside) + os.sep

    def end(self, asked: bool) -> list[tuple[str, str]]:
        """(kind of fault, what) of all that was touched since `begin`."""
        inside, self.inside = self.inside, None
        faults = [seen for seen in self.seen if seen[0] != "open"]
        for path, mode, flags in [seen[1] for seen in self.seen if seen[0] == "open"]:
            whole = os.path.realpath(path)
            writes = set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            fine = whole.startswith((inside, TEMPORARY)) or "__pycache__" in whole
            if not fine and whole != os.devnull and (writes or not asked and not whole.startswith(READABLE)):
                faults.append(("outside", f"{'wrote' if writes else 'opened'} {path}"))
        return faults + [("outside", f"read {name}") for name in ([] if asked else self.touched())] + self.called()

    def touched(self) -> list[str]:
        try:
            data, names = os.read(self.opened, 1 << 16), set()
        except BlockingIOError:
            return []
        while data:
            size = struct.unpack("iIII", data[:16])[3]
            names.add(data[16 : 16 + size].rstrip(b"\0").decode())
            data = data[16 + size :]
        return sorted(names - {""})

    def called(self) -> list[tuple[str, str]]:
        try:
            self.server.accept()[0].close()
            return [("network", f"called {self.address}")]
        except BlockingIOError:
            return []


def memory(name: str) -> int:
    """Bytes of memory of this process: VmRSS now, VmHWM at the peak since it was last reset."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))


def stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)


@contextmanager
def caught():
    """Context manager: a text stream of what is said on stderr, without what libraries remark by C or `warnings`."""
    kept, nowhere, last = os.dup(2), os.open(os.devnull, os.O_WRONLY), logging.lastResort
    os.dup2(nowhere, 2)
    logging.lastResort = logging.NullHandler()
    try:
        with redirect_stdout(stream()), redirect_stderr(stream()) as err, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield err
    finally:
        logging.lastResort = last
        os.dup2(kept, 2)
        os.close(kept), os.close(nowhere)


def judge(watch: Watch, folder: str, case: Case) -> Outcome:
    """Run a command in the folder of its input, as its user would, and say what came of it."""
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    argv, before, began = sys.argv, memory("VmRSS"), time.monotonic()
    status, error, wrong, result = 0, None, None, []
    os.chdir(folder)
    try:
        with caught() as err:
            watch.begin(folder)
            try:
                cli.run(lambda: result.append(case.command()))
            except SystemExit as end:
                status = end.code or 0
            except BaseException as raised:
                error = raised
            faults = watch.end(case.asked)
            seconds, growth = time.monotonic() - began, memory("VmHWM") - before
            if result and not status and not error:  # --help has none
                case.check(result[0])
    except Wrong as raised:
        wrong = raised
    finally:
        os.chdir(cli.ROOT)
        sys.argv = argv
    said = re.split(r"[\r\n]+", err.buffer.getvalue().decode())
    said = [line for line in said if line.strip() and not PROGRESS.search(line)]
    rest = [line for line in said if not line.startswith("warning: ")]
    kind, what = "right", ""
    if error:
        kind, what = "traceback", described(error)
    elif os.path.exists(os.path.join(folder, "ran")):
        kind, what = "program", "ran a command of the input"
    elif any("Traceback" in line for line in said):
        kind, what = "traceback", said[-1]
    elif faults:
        kind, what = faults[0]
    elif seconds > SECONDS:
        kind, what = "hang", f"{seconds:.0f} s"
    elif growth > MEMORY:
        kind, what = "memory", f"{growth / 2**30:.1f} GiB"
    elif status not in (0, 2):
        kind, what = "status", f"status {status}"
    elif wrong:
        kind, what = "wrong", str(wrong)
    elif status == 2:
        kind, what = ("refused", rest[0]) if len(rest) == 1 else ("lines", f"{len(rest)} lines: {' | '.join(rest[:3])}")
    outcome = Outcome(kind, what[:300], seconds, growth)
    outcome.what += f" -> {case.line}" * (outcome.fault and bool(case.line))
    return outcome


def described(error: BaseException) -> str:
    """An exception with the innermost line of ours that it came through: the same for the same fault."""
    frames = traceback.extract_tb(error.__traceback__)
    names = [os.path.relpath(f.filename, cli.ROOT) for f in frames]
    ours = [f for f, name in zip(frames, names) if not name.startswith(("..", "tests"))]
    last = (ours or frames)[-1]
    text = str(error).strip().split("\n")[0][:120]
    return f"{os.path.relpath(last.filename, cli.ROOT)}, {last.name}: {last.line} -> {type(error).__name__}: {text}"
