"""training/ranks.py and training/watchdog.py: a rank that dies or hangs ends the job, by name."""

import os
import re
import signal
import subprocess
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from runs import LIMIT, ONE_THREAD, ROOT, torchrun

from training import ranks
from training.ranks import Interrupt, Ranks
from training.watchdog import Watchdog

# ---------------------------------------------------------------------------------------------------------------------
# The judgement, on states as the store has them


class Left(Exception):
    pass


@pytest.fixture
def watchdog(monkeypatch):
    """A watchdog of rank 1 of 3, without its thread; it raises Left where it would end the process."""
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("faulthandler.dump_traceback", lambda: None)
    watchdog = Watchdog(dist.HashStore(), 1, 3, timeout=600)
    monkeypatch.setattr(watchdog, "leave", lambda why: (_ for _ in ()).throw(Left(why)))
    return watchdog


def judge(watchdog, progress=(7, 6, 7), heartbeat_age=(1, 1, 1), progress_age=(1, 1, 1), **flags):
    names = ("patient", "ended", "failed")
    states = [{"progress": n, "place": f"place {r}"} | {name: r in flags.get(name, ()) for name in names}
              for r, n in enumerate(progress)]
    age = {(r, "heartbeat"): seconds for r, seconds in enumerate(heartbeat_age)}
    watchdog.judge(states, age | {(r, "progress"): seconds for r, seconds in enumerate(progress_age)})


OLD = (601, 601, 601)


@pytest.mark.parametrize("state, says", [
    ({"failed": [2]}, r"rank 2 \(last at: place 2\) ended with an error: the job ends"),
    ({"heartbeat_age": (601, 1, 1)}, r"rank 0 \(last at: place 0\) sent no heartbeat for 600 s: the job ends"),
    ({"heartbeat_age": (601, 1, 1), "patient": [0, 1, 2]}, "rank 0 .* sent no heartbeat"),
    ({"progress_age": OLD}, "rank 1 made no progress for 600 s: it ends"),
    ({"progress_age": OLD, "progress": (5, 6, 5)}, r"rank 0 \(.*\), rank 2 \(.*\) made no progress for 600 s: the job"),
    ({"progress_age": OLD, "progress": (5, 6, 7), "ended": [0]}, "rank 1 made no progress")])
def test_who_is_to_blame(watchdog, capsys, state, says):
    with pytest.raises(Left, match=says):
        judge(watchdog, **state)
    assert ("rank 1 hangs here:" in capsys.readouterr().err) == says.startswith("rank 1 made no progress")


@pytest.mark.parametrize("state", [
    {}, {"progress_age": (601, 601, 1)}, {"progress_age": OLD, "patient": [2]},
    {"progress_age": OLD, "ended": [0, 1, 2]}, {"heartbeat_age": (601, 1, 1), "ended": [0]}])
def test_who_is_not(watchdog, state):
    judge(watchdog, **state)


def test_patience_is_nested_and_its_end_is_progress(watchdog):
    seen = []
    watchdog.at("data")
    with watchdog.patient("model"):
        seen.append((watchdog.is_patient, watchdog.place))
        with watchdog.patient("lists"):
            seen.append((watchdog.is_patient, watchdog.place))
        seen.append((watchdog.is_patient, watchdog.place))
        before = watchdog.progress
    assert seen == [(True, "model"), (True, "lists"), (True, "lists: done")]
    assert not watchdog.is_patient and watchdog.progress == before + 1 and watchdog.place == "model: done"


@pytest.mark.parametrize("ended", [False, True])
def test_a_store_that_is_gone_ends_the_job_unless_it_has_ended(watchdog, monkeypatch, ended):
    def gone(*_):
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(watchdog, "store", SimpleNamespace(set=gone))
    if ended:
        watchdog.ended.set()
    with nullcontext() if ended else pytest.raises(Left, match="the store of rank 0's machine is gone"):
        watchdog.watch()


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def reads_from_a_dead_disk():
    threading.Event().wait()


def step_until(what: str):
    """Steps of two ranks, in the fourth of which something happens to rank 1."""
    with Ranks(timeout=8) as ranks:
        assert ranks.from_rank_0("x", lambda: {"a": [1, 2]}) == {"a": [1, 2]}
        assert ranks.sum(torch.tensor([1.0, float(ranks.rank)])).tolist() == [2, 1]
        taken = torch.zeros(7)
        for n, item in ranks.take("items", list("abcdefg")):
            taken[n] += "abcdefg"[n] == item
        assert ranks.sum(taken).tolist() == [1] * 7  # each by one of the two
        for step in range(5):
            ranks.at("data")
            if ranks.rank == 1 and step == 3:
                if what == "hang":
                    reads_from_a_dead_disk()
                if what == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if what == "raise":
                    raise FileNotFoundError("gone")
            ranks.at("update")
            ranks.sum(torch.zeros(1))


def test_ranks_leave_together(processes):
    """And start again with the store that they left."""
    assert [processes.run(["nothing"], ranks=2, target=step_until) for _ in range(2)] == [[0, 0]] * 2


def test_a_rank_that_hangs_is_named_with_its_stack(processes):
    statuses = processes.run(["hang"], ranks=2, target=step_until)
    text = processes.log.read_text()
    assert statuses == [1, 1] and "rank 1 hangs here:" in text and "in reads_from_a_dead_disk" in text
    assert "rank 1 made no progress for 8 s: it ends" in text and "rank 0 hangs" not in text


def test_a_rank_that_is_stopped_is_named(processes):
    processes.start(["stop"], ranks=2, target=step_until)
    processes.all[0].join(LIMIT)
    assert processes.all[0].exitcode == 1
    assert processes.kill() == [1, -9]
    text = processes.log.read_text()
    assert re.search(r"rank 1 \(last at: \w+\) sent no heartbeat for 8 s: the job ends", text), text


def test_a_rank_that_fails_ends_the_others(processes):
    assert processes.run(["raise"], ranks=2, target=step_until) == [1, 1]
    assert "FileNotFoundError: gone" in processes.log.read_text()


@pytest.mark.slow
def test_torchrun_names_the_rank_that_hangs(tmp_path):
    (tmp_path / "hang.py").write_text("from test_ranks import step_until\nstep_until('hang')\n")
    path = os.pathsep.join([ROOT, f"{ROOT}/tests", os.path.dirname(__file__)])
    done = subprocess.run([*torchrun(2), tmp_path / "hang.py"], capture_output=True, text=True, timeout=LIMIT,
                          env=ONE_THREAD | {"PYTHONPATH": path})
    assert done.returncode == 1 and "rank      : 1 (local_rank: 1)" in done.stderr, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# One process


def test_alone_there_is_nobody_to_watch(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with Ranks(timeout=1) as alone, alone.patient("model"):
        alone.at("data")
        assert (alone.rank, alone.world, alone.from_rank_0("x", lambda: 5)) == (0, 1, 5)
        assert alone.sum(torch.ones(2)).tolist() == [1, 1]
        assert list(alone.take("items", ["a", "b"])) == [(0, "a"), (1, "b")]


def test_interrupts_are_noted_and_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with Ranks(timeout=1) as alone, Interrupt() as interrupt:
        assert not interrupt.anywhere(alone)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.anywhere(alone) and interrupt.name == "SIGTERM"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the second one ends the process
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_process_has_a_gpu_and_its_share_of_the_cores(monkeypatch):
    """Pretended: two GPUs and eight cores."""
    called = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: called.update(device=device))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: called.update(threads=n))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert ranks.pick_own_device() == called.pop("device") == torch.device("cuda", 0) and not called
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert ranks.pick_own_device() == called["device"] == torch.device("cuda", 1) and called["threads"] == 4
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="processes must not outnumber the 2 GPUs of this machine, got 3"):
        ranks.pick_own_device()
