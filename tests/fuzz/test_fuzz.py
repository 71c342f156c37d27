"""A small seeded sample of what run.py does at length; and the judge itself can fail."""

import mmap
import os
import subprocess
import sys
import time
from contextlib import suppress

import judge
import pytest
import run

SAMPLE = 15  # inputs of each door


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    from doors import World  # not above: the processes of the last tests need none of it

    folder = str(tmp_path_factory.mktemp("fuzz"))
    return World(folder, folder)


@pytest.mark.parametrize("door", run.NAMES)
def test_mutated_inputs_come_out_right_or_are_refused_in_one_line(fuzzed, tmp_path, door):
    for n in range(SAMPLE):
        outcome = run.attempt(fuzzed, door, 0, n, str(tmp_path / "in"))
        assert not outcome.fault, f"{outcome.kind}: {outcome.what}\n{run.repeat((door, 0, n))}"


def plant(kind, world):
    """What a command may do wrong, by the kind that the judge must call it."""
    secret = os.path.join(world.watch.outside, "s.txt")
    if kind == "traceback":
        [][0]
    elif kind == "lines":
        print("one line too many", file=sys.stderr)
        raise ValueError("the line that is right")
    elif kind == "status":
        sys.exit(1)
    elif kind == "outside":
        os.close(os.open(secret, os.O_RDONLY))
    elif kind == "outside, by C":
        import av

        av.open(os.path.join(world.watch.outside, "s.mp4")).close()
    elif kind == "network":
        import av

        with suppress(av.FFmpegError):
            av.open(f"http://{world.watch.address}/x", timeout=0.2)
    elif kind == "program":
        subprocess.run("true")
    elif kind == "memory":
        with mmap.mmap(-1, 64 << 20) as pages:  # new ones: a heap that was larger once would give its own
            pages.write(bytes(64 << 20))
    elif kind == "hang":
        time.sleep(0.2)


@pytest.mark.parametrize("kind", ("traceback", "lines", "status", "outside", "outside, by C", "network", "program",
                                  "memory", "hang", "wrong"))
def test_the_judge_finds_a_planted_fault(fuzzed, tmp_path, monkeypatch, kind):
    def check(result):
        if kind == "wrong":
            raise judge.Wrong("not right")

    monkeypatch.setattr(judge, "MEMORY", 32 << 20)
    monkeypatch.setattr(judge, "SECONDS", 0.1 if kind == "hang" else 30)
    outcome = judge.judge(fuzzed.watch, str(tmp_path), judge.Case(lambda: plant(kind, fuzzed), check))
    assert outcome.kind == kind.split(",")[0], outcome


def test_the_judge_lets_right_results_and_refusals_pass(fuzzed, tmp_path):
    def refuse():
        print("warning: something odd", file=sys.stderr)
        raise ValueError("x must be y, got z")

    assert judge.judge(fuzzed.watch, str(tmp_path), judge.Case(lambda: 3)).kind == "right"
    assert judge.judge(fuzzed.watch, str(tmp_path), judge.Case(refuse)).kind == "refused"


def bad_worker(pipe, scratch, folder):
    """Be a worker that dies, hangs, or takes memory, as it is told."""
    os.makedirs(folder, exist_ok=True)
    pipe.send(None)
    kind = pipe.recv()[0]
    if kind == "death":
        os.abort()
    kept = bytearray(200 << 20) if kind == "memory" else None
    time.sleep(60)
    del kept


def test_workers_that_die_hang_or_eat_memory_are_replaced_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "work", bad_worker)
    monkeypatch.setattr(run, "SECONDS", 0.7)
    monkeypatch.setattr(run, "MEMORY", 100 << 20)
    jobs = [(kind, 0, 0) for kind in ("death", "hang", "memory")]
    found = dict(run.fuzz(jobs, 1, str(tmp_path / "scratch"), str(tmp_path / "keep")))
    assert {job[0]: outcome.kind for job, outcome in found.items()} == {kind: kind for kind, _, _ in jobs}
    assert "--only 0" in (tmp_path / "keep" / "death-0-0" / "repeat").read_text()
