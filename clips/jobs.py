"""What the commands of this folder share: work in threads, folders that one job holds, and files of JSON lines that
outlive an interruption."""

import glob
import json
import os
import platform
import threading
import time
import uuid
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from cli import read_text

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None


@contextmanager
def in_threads(work, chosen, threads: int | None = None, ahead=64):
    """Context manager: an iterator over work(i) for each i of `chosen`, in order, computed by threads.

    Left early, by Ctrl-C or an error, it waits for what is being computed and for nothing else.

    threads  default: own_threads()
    ahead    how many to begin before they are asked for
    """
    pool = ThreadPoolExecutor(threads or own_threads())
    try:
        yield results(pool, work, chosen, ahead)
    finally:
        pool.shutdown(cancel_futures=True)


def own_threads() -> int:
    """How many cores of this machine each of its processes has, under torchrun or alone."""
    return max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def results(pool: ThreadPoolExecutor, work, chosen, ahead: int):
    waiting = deque()
    for i in chosen:
        waiting.append(pool.submit(work, i))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def lock(file) -> bool:
    """Lock an open file until it is closed or the process ends, however it ends -> False when another process has it.

    True too where there are no locks: on Windows, and on some network file systems.
    """
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def is_at(file, path: str) -> bool:
    """Whether an open file is still the one at a path."""
    return os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path))


LOCK, PATIENCE = ".lock", 60  # seconds until a network drive must have shown a new file to all machines


@contextmanager
def held(folder: str):
    """Context manager: make a folder, and keep other jobs out of it -> the lock, an open file. Raises ValueError when
    another job has it. The system releases the lock when the process ends, however it ends."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, LOCK)
    with open(path, "a+", encoding="ascii") as file:
        if not lock(file) or not is_at(file, path):
            raise ValueError(f"another job writes to {folder}: choose another folder, or end that job")
        yield file


def sign(file) -> str:
    """Write a word into a lock that nobody can guess, for `require_held` -> the word."""
    word = uuid.uuid4().hex
    file.truncate(0)
    file.write(word)
    file.flush()
    os.fsync(file.fileno())  # for machines that share the folder
    return word


def require_held(folder: str, word: str, patience=0):
    """Raise ValueError unless a folder is held by the job that signed its lock with a word, as seen from here.

    patience  seconds until it must be seen
    """
    path, end = os.path.join(folder, LOCK), time.monotonic() + patience
    while (found := read_text(path) if os.path.exists(path) else None) != word:
        if time.monotonic() >= end and found is None:
            raise ValueError(f"{platform.node()} does not see {folder} of rank 0: all machines must share its disk")
        if time.monotonic() >= end:
            raise ValueError(f"{folder} on {platform.node()} is held by another job, or is not that of rank 0: choose "
                             "a folder that all machines share, or end that job")
        time.sleep(0.5)


CHUNK = 16  # items that a rank takes at once


def taken(ranks, name: str, count: int, known):
    """Yield the numbers below `count` that this rank takes and that are not known, see `Ranks.take`."""
    chunks = [range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
    for _, chunk in ranks.take(name, chunks):
        yield from (i for i in chunk if i not in known)


def read_notes(stem: str, counts) -> dict[int, dict]:
    """item -> its line, of those in STEM-*.jsonl, the files of all ranks, that count: counts(line)."""
    found = {}
    for path in sorted(glob.glob(glob.escape(stem) + "-*.jsonl")):
        with open(path, encoding="utf-8") as file:
            lines = (json.loads(line) for line in file if line.endswith("\n"))  # an interruption may have torn the last
            found |= {line["item"]: line for line in filter(counts, lines)}
    return found


class Clock:
    """Seconds that parts of some work took, of all threads together: `with clock("part"):`."""

    def __init__(self):
        self.began, self.seconds, self.lock = time.perf_counter(), Counter(), threading.Lock()

    @contextmanager
    def __call__(self, part: str):
        began = time.perf_counter()
        yield
        with self.lock:
            self.seconds[part] += time.perf_counter() - began

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def busy(self, part: str, threads=1) -> float:
        """The share of the time so far that some threads spent on a part."""
        return self.seconds[part] / threads / self.elapsed()


@contextmanager
def appending(path: str):
    """Context manager: open a file of JSON lines, in binary, to read it and to append to it, alone.

    A last line that an interruption tore is cut off. Raises ValueError while another process has the file.
    """
    try:
        with open(path, "a+b") as file:
            if not lock(file) or not is_at(file, path):
                raise ValueError(f"{path} is being written by another process: wait for it, or stop it")
            file.seek(0)
            file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))
            file.seek(0)
            yield file
    except OSError as error:
        if error.filename or not error.strerror:
            raise
        raise OSError(f"{path} cannot be written: {error.strerror}") from error  # a full disk
