"""What the commands of this folder share: work in threads, and files of JSON lines that outlive an interruption."""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None


@contextmanager
def in_threads(work, chosen, threads: int | None = None, ahead=64):
    """Context manager: an iterator over work(i) for each i of `chosen`, in order, computed by threads.

    Left early, by Ctrl-C or an error, it waits for what is being computed and for nothing else.

    threads  default: as many as there are cores
    ahead    how many to begin before they are asked for
    """
    pool = ThreadPoolExecutor(threads or os.cpu_count())
    try:
        yield results(pool, work, chosen, ahead)
    finally:
        pool.shutdown(cancel_futures=True)


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


@contextmanager
def appending(path: str):
    """Context manager: open a file of JSON lines, in binary, to read it and to append to it, alone.

    A last line that an interruption tore is cut off. Raises ValueError while another process has the file.
    """
    try:
        with open(path, "a+b") as file:
            if not lock(file) or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                raise ValueError(f"{path} is being written by another process: wait for it, or stop it")
            file.seek(0)
            file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))
            file.seek(0)
            yield file
    except OSError as error:
        if error.filename or not error.strerror:
            raise
        raise OSError(f"{path} cannot be written: {error.strerror}") from error  # a full disk
