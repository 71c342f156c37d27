"""ranks.py: a rank that dies or hangs ends the job, in time and by name."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ONE_THREAD, ROOT, assert_equal_states, ci_options, running, wait_for, weights, worker


@pytest.mark.parametrize("name, says", [
    ("SIGKILL", "exitcode  : -9"), ("SIGSTOP", "rank 1 (last at: ")])
def test_a_rank_that_is_gone_ends_the_job(start, world, finished, tmp_path, name, says):
    shutil.copytree(finished[0] / "encoded", tmp_path / "encoded")
    log = tmp_path / "log"
    process = start([*ci_options(world, tmp_path), "--prompts=()", "--batch_size=2", "--max_steps=100000",
                     "--sheet_every=100000", "--timeout=5"], 2, log)
    wait_for(log, 9, process)
    os.kill(worker(tmp_path, rank=1), getattr(signal, name))
    began = time.time()
    assert process.wait(90) == 1, log.read_text()
    text = log.read_text()
    assert says in text, text
    if name == "SIGKILL":
        assert "rank      : 1 (local_rank: 1)" in text
    else:
        assert "gives no sign of life since 5 s: the job ends" in text
        assert time.time() - began < 5 + 5 + 30 + 10  # torchrun gives the stopped process 30 s to end by itself
    assert not running(f"--out_dir={tmp_path}/run")


HANGING = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch
from training.ranks import Ranks

def reads_from_a_dead_disk():
    time.sleep(1000)

with Ranks(timeout=3) as ranks:
    assert ranks.from_rank_0("x", lambda: time.sleep(6) or {"a": [1, 2]}) == {"a": [1, 2]}  # may outlast the timeout
    assert ranks.sum(torch.tensor([1.0, float(ranks.rank)])).tolist() == [2, 1]
    for step in range(100):
        ranks.at("data")
        if ranks.rank == 1 and step == 3:
            reads_from_a_dead_disk()
        ranks.at("update")
        ranks.sum(torch.zeros(1))
"""


def test_a_rank_that_hangs_is_named_with_its_stack(tmp_path):
    (tmp_path / "hang.py").write_text(HANGING)
    began = time.time()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
                           tmp_path / "hang.py", ROOT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and time.time() - began < 60
    assert "rank 1 hangs here:" in done.stderr and "in reads_from_a_dead_disk" in done.stderr
    assert "rank 1 does not come on: it ends after 3 s" in done.stderr
    assert "rank 0 hangs" not in done.stderr and "rank      : 1 (local_rank: 1)" in done.stderr


def test_alone_there_is_nobody_to_watch(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    from training.ranks import Ranks

    with Ranks(timeout=1) as ranks:
        ranks.at("data")
        assert (ranks.rank, ranks.world, ranks.from_rank_0("x", lambda: 5)) == (0, 1, 5)


@pytest.mark.slow
def test_two_machines_start_again_together(world, finished, by_two, tmp_path):
    """Two torchruns, as on two machines. A rank is killed: only its own counts a failure, and yet both go on."""
    shutil.copytree(finished[0] / "encoded", tmp_path / "encoded")
    log = tmp_path / "log"
    arguments = [*ci_options(world, tmp_path), "--prompts=()", "--batch_size=2", "--save_every=1", "--keep=9"]
    machines = [start_machine(arguments, log) for _ in range(2)]
    wait_for(log, 9, machines[0])
    os.kill(worker(tmp_path, rank=1), signal.SIGKILL)
    assert [machine.wait(120) for machine in machines] == [0, 0], log.read_text()
    assert log.read_text().count("resume from") == 2
    a, b = weights(by_two), weights(tmp_path)
    a.pop("config"), b.pop("config")
    assert_equal_states(a, b)


def start_machine(arguments, log):
    options = ["--nnodes=2", "--nproc_per_node=1", "--max-restarts=2", "--rdzv_backend=c10d", "--rdzv_id=two",
               "--rdzv_endpoint=localhost:29517"]
    with open(log, "a") as out:
        return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *options, "train.py", "configs/ci.py",
                                 *arguments], cwd=ROOT, stdout=out, stderr=out, env=ONE_THREAD)
