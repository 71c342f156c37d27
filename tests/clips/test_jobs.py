"""Work in threads, folders that one job holds, and files that one process appends to."""

import subprocess
import sys
import time

import pytest
from conftest import ROOT

from clips.jobs import LOCK, Clock, appending, held, in_threads, require_held, sign


def test_results_come_in_order_and_few_are_begun_ahead():
    begun = []

    def work(i):
        begun.append(i)
        return i * i

    with in_threads(work, range(100), threads=3, ahead=5) as results:
        for i, result in enumerate(results):
            assert result == i * i and len(begun) <= i + 6
    assert sorted(begun) == list(range(100))


def test_whoever_leaves_early_waits_only_for_what_is_being_computed():
    begun = []

    def work(i):
        begun.append(i)
        time.sleep(i and 0.5)

    with pytest.raises(KeyboardInterrupt):
        with in_threads(work, range(100), threads=2, ahead=50) as results:
            next(results)
            raise KeyboardInterrupt
    assert len(begun) < 50


def test_an_error_of_the_work_is_raised():
    with pytest.raises(ZeroDivisionError):
        with in_threads(lambda i: 1 // (3 - i), range(9)) as results:
            list(results)


def test_a_torn_line_is_cut_off(tmp_path):
    path = tmp_path / "lines.jsonl"
    for torn in ("", "1\n2", "1\n2\n"):
        path.write_text(torn)
        with appending(str(path)) as file:
            whole = file.read()
            file.write(b"3\n")
        assert path.read_bytes() == whole + b"3\n" and whole.decode() == torn[: torn.rfind("\n") + 1]


def test_one_process_at_a_time(tmp_path):
    path = str(tmp_path / "lines.jsonl")
    with appending(path):
        other = f"from clips.jobs import appending\nwith appending({path!r}): pass"
        done = subprocess.run([sys.executable, "-c", other], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert "ValueError" in done.stderr and "lines.jsonl is being written by another process" in done.stderr
    with appending(path):
        pass


def test_a_folder_is_held_by_one_job(tmp_path):
    """Whoever comes while it is held is told; whoever no longer holds it, or does not see it, is told."""
    folder = str(tmp_path / "folder")
    with held(folder) as lock:
        word = sign(lock)
        require_held(folder, word)
        other = f"from clips.jobs import held\nwith held({folder!r}): pass"
        done = subprocess.run([sys.executable, "-c", other], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert f"ValueError: another job writes to {folder}: choose another folder" in done.stderr
        require_held(folder, word)
        assert sign(lock) != word
        with pytest.raises(ValueError, match="folder on .* is held by another job"):
            require_held(folder, word)
        (tmp_path / "folder" / LOCK).unlink()
        began = time.monotonic()
        with pytest.raises(ValueError, match="does not see .*folder of rank 0"):
            require_held(folder, word, patience=1)
        assert time.monotonic() - began >= 1
    with held(folder):
        pass


def test_a_clock_adds_up_threads():
    clock = Clock()

    def work(i):
        with clock("sleep"):
            time.sleep(0.1)

    with in_threads(work, range(8), threads=4) as results:
        list(results)
    assert clock.seconds["sleep"] >= 0.8 and 0.3 < clock.busy("sleep", 4) <= 1
