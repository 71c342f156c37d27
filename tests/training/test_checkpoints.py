"""training/checkpoints.py: interrupted, damaged and foreign checkpoints, full disks, and a folder for one run alone."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    BY_TWO,
    LIMIT,
    ONE_THREAD,
    ROOT,
    assert_same_run,
    ci_options,
    keep,
    metrics,
    torchrun,
    train_here,
    weights,
)

from training.checkpoints import is_whole

# ---------------------------------------------------------------------------------------------------------------------
# Interrupted


def test_a_killed_run_ends_with_the_same_weights(processes, world, finished, tmp_path):
    """Killed within a step, with a checkpoint written but not in place, and before it is written: to the bit."""
    shutil.copytree(finished[0] / "encoded", tmp_path / "encoded")
    options = [*ci_options(world, tmp_path), "--save_every=1", "--prompts=()", "--keep=9"]
    deaths = [("train.loss_of", 4), ("os.replace", 5), ("torch.save", 3)]
    for function, call in deaths:
        assert processes.run(options, die=(0, "SIGKILL", function, call)) == [-9]
    last = train_here(*options)
    assert last.returncode == 0 and processes.log.read_text().count("resume from") == 2
    assert "step-00000008.pt" in last.stdout.splitlines()[1]  # three steps, then three and the log, then two
    assert_same_run(finished[0], tmp_path)
    assert metrics(tmp_path, "loss") == metrics(finished[0], "loss")  # no step is logged twice, none is missing


def test_a_rank_that_dies_comes_back(processes, world, by_two, tmp_path):
    """As under torchrun --max-restarts: the other one ends with it, and both go on as if unhurt."""
    shutil.copytree(by_two / "encoded", tmp_path / "encoded")
    options = [*ci_options(world, tmp_path), *BY_TWO, "--batch_size=2"]
    assert processes.run(options, ranks=2, die=(1, "SIGKILL", "train.loss_of", 7)) == [1, -9]
    assert processes.run(options, ranks=2) == [0, 0], processes.log.read_text()
    assert processes.log.read_text().count("resume from") == 2
    assert_same_run(by_two, tmp_path, 10)
    assert metrics(by_two, "loss") == metrics(tmp_path, "loss")


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ["--max-restarts=1"],
    ["--nnodes=2", "--nproc_per_node=1", "--max-restarts=2", "--rdzv_backend=c10d", "--rdzv_id=two",
     "--rdzv_endpoint=localhost:29517"]], ids=["one machine", "two machines"])
def test_torchrun_starts_again_what_died(world, by_two, tmp_path, options):
    """Only the one of two machines that lost its rank counts a failure, and yet both go on."""
    shutil.copytree(by_two / "encoded", tmp_path / "encoded")
    command = [*torchrun(2, *options), "tests/runs.py", "1", "SIGKILL", "train.loss_of", "7", "train.py",
               "configs/ci.py", *ci_options(world, tmp_path), *BY_TWO, "--batch_size=2"]
    machines = 2 if "--nnodes=2" in options else 1
    if machines == 2:
        command.remove("--standalone")
    with open(tmp_path / "log", "w") as log:
        started = [subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=ONE_THREAD | {"PYTHONPATH": ROOT})
                   for _ in range(machines)]
    assert [process.wait(LIMIT) for process in started] == [0] * machines, (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text().count("resume from") == 2
    assert_same_run(by_two, tmp_path, 10)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_killed_at_any_time_ends_with_the_same_weights(processes, world, finished, tmp_path, ranks):
    """Twenty times, after 0 to 3 s."""
    shutil.copytree(finished[0] / "encoded", tmp_path / "encoded")
    options = [*ci_options(world, tmp_path), "--save_every=1", "--prompts=()", "--max_steps=66"]
    options += [f"--batch_size={4 // ranks}"]
    assert processes.run([*options, f"--out_dir={tmp_path}/whole/run"], ranks) == [0] * ranks
    for seconds in np.random.default_rng(ranks).uniform(0, 3, 20):
        processes.start(options, ranks)
        time.sleep(3 + seconds)
        processes.kill()
    assert processes.run(options, ranks) == [0] * ranks
    assert_same_run(tmp_path, tmp_path / "whole", 66)
    assert metrics(tmp_path, "loss") == metrics(tmp_path / "whole", "loss")


# ---------------------------------------------------------------------------------------------------------------------
# Resumed


@pytest.mark.parametrize("place", [6, 8])  # of an entry's head: the version that it needs, and whether it is encrypted
def test_whatever_damage_does_to_a_checkpoint_it_is_not_whole(copied, place):
    path = copied / "run" / "step-00000020.pt"
    assert is_whole(str(path))
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + place] ^= 0x41
    path.write_bytes(data)
    assert not is_whole(str(path))


def test_a_damaged_checkpoint_is_passed_over(finished, copied, world):
    newest = copied / "run" / "step-00000020.pt"
    data, name = bytearray(newest.read_bytes()), "unet.time_embed.0.weight"
    data[data.index(weights(copied)["module"][name].numpy().tobytes()) + 7] ^= 1  # one bit
    newest.write_bytes(data)
    done = train_here(*ci_options(world, copied), "--keep=1", "--prompts=()")
    assert done.returncode == 0 and f"{newest} is damaged, now called {newest}.damaged" in done.stderr
    assert "resume from" in done.stdout and "step-00000015.pt" in done.stdout
    assert newest.with_name(newest.name + ".damaged").read_bytes() == data  # no longer one of those to keep
    assert [name for name in os.listdir(copied / "run") if name.endswith(".pt")] == [newest.name]
    assert_same_run(finished[0], copied)


def test_a_step_of_other_size_is_told(copied, world):
    done = train_here(*ci_options(world, copied), "--batch_size=2", "--max_steps=21", "--prompts=()")
    assert done.returncode == 0 and "a step was of 4 samples before, now of 2" in done.stderr
    same = train_here(*ci_options(world, copied), "--batch_size=1", "--accumulate=2", "--max_steps=22", "--prompts=()")
    assert same.returncode == 0 and "a step was of" not in same.stderr


def test_a_run_in_the_way_is_not_overwritten(finished, world):
    done = train_here(*ci_options(world, finished[0]), "--resume=False")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"resume is False, but {finished[0]}/run/step-00000020.pt is there" in done.stderr


@pytest.mark.parametrize("wrong", ["model", "average"])
def test_a_checkpoint_of_another_model_is_refused(copied, world, wrong):
    state = weights(copied)
    del state["optimizer"]["average"]  # as a run without a moving average leaves it
    if wrong == "average":
        torch.save(state, copied / "run" / "step-00000020.pt")
    tiny = ["--model=tiny", f"--vae={copied}/run/model.safetensors"]
    done = train_here(*ci_options(world, copied), *(tiny if wrong == "model" else []))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "step-00000020.pt is of another model or optimizer than the config's" in done.stderr


@pytest.mark.slow
def test_resuming_needs_no_more_memory_than_starting(world, finished, tmp_path):
    """The process alone counts: pages of the mapped checkpoint belong to the system, which takes them when it wants."""
    shutil.copytree(finished[0] / "encoded", tmp_path / "encoded")
    options = [*ci_options(world, tmp_path), "--model=tiny", f"--vae={finished[0]}/run/model.safetensors",
               "--prompts=()", "--max_steps=4", "--save_every=2"]
    peaks = []
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "train.py", "configs/ci.py", *options], cwd=ROOT, env=ONE_THREAD,
                                   stdout=subprocess.PIPE, text=True)
        peaks.append(0)
        while process.poll() is None:
            found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
            peaks[-1] = max(peaks[-1], int(found[1]) / 1e6 if found else 0)
            time.sleep(0.002)
        assert process.returncode == 0 and ("resume from" in process.stdout.read()) == (len(peaks) == 2)
        keep(tmp_path, 2)
    started, resumed = peaks
    assert 0.3 < resumed <= 1.1 * started, peaks


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def test_two_runs_into_one_folder_are_refused(copied, world):
    """While a lock is held; a lock that nobody holds any more is no obstacle."""
    options = [*ci_options(world, copied), "--prompts=()", "--max_steps=21"]
    with open(copied / "run" / ".lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        before = sorted(os.listdir(copied / "run"))
        done = train_here(*options)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert f"train.py: another job writes to {copied}/run: choose" in done.stderr
        assert sorted(os.listdir(copied / "run")) == before
    assert train_here(*options).returncode == 0


def test_a_killed_run_leaves_its_folder_free(processes, world, finished, tmp_path):
    shutil.copytree(finished[0] / "encoded", tmp_path / "encoded")
    options = [*ci_options(world, tmp_path), "--prompts=()", "--max_steps=1"]
    assert processes.run(options, die=(0, "SIGKILL", "train.loss_of", 1)) == [-9]
    assert train_here(*options).returncode == 0


def test_a_folder_that_cannot_be_made_is_told(world, tmp_path):
    done = train_here(*ci_options(world, tmp_path), "--out_dir=/dev/null/run")
    assert done.returncode == 2 and done.stderr == "train.py: /dev/null/run: Not a directory\n"


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(world, finished, tmp_path):
    """On a file system where the first checkpoint fits and the second does not."""
    shutil.copytree(finished[0] / "encoded", tmp_path / "encoded")
    size = (finished[0] / "run" / "step-00000020.pt").stat().st_size
    (tmp_path / "run").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", tmp_path / "run"])
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        done = train_here(*ci_options(world, tmp_path), "--save_every=2", "--prompts=()")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert "step-00000004.pt cannot be written: is the disk full? The checkpoints before it are" in done.stderr
        assert sorted(name for name in os.listdir(tmp_path / "run") if "step" in name) == ["step-00000002.pt"]
        assert is_whole(str(tmp_path / "run" / "step-00000002.pt"))
    finally:
        subprocess.run(["umount", tmp_path / "run"], check=True)
