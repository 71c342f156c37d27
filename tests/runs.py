"""Runs of configs/ci.py for the tests: inside the test's process, as ranks in processes of their own, under torchrun.

Processes come from a fork server that has imported everything: starting one takes no time, and one can be told to send
itself a signal at a certain call of a certain function, so that no test has to be there at the right moment.

    python tests/runs.py RANK SIGNAL FUNCTION CALL train.py configs/ci.py ...     the same for a rank of torchrun
"""

import fcntl
import importlib
import io
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import cli
import train

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
LIMIT = 600  # seconds after which a test gives up, on a machine however busy


def start(name: str, *arguments: str):
    """What `python NAME ...` does, or `python -m NAME ...`."""
    sys.argv = [name, *arguments]
    if name.endswith(".py"):
        runpy.run_path(name, run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)


def here(name, *arguments):
    """Run a script, "sample.py", or a module, "lab.toy", inside this process -> as a finished process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        patch.chdir(ROOT)
        with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, of modules that are imported already
            try:
                start(*sys.argv)
            except SystemExit as end:
                status = end.code or 0
    return subprocess.CompletedProcess(sys.argv, status, out.getvalue(), err.getvalue())


def ci_options(world, folder) -> list[str]:
    return [f"--toy={world}", f"--encoded={folder}/encoded", f"--out_dir={folder}/run"]


def train_here(*arguments):
    """A run of configs/ci.py inside this process, to its end or its error -> as a finished process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes of ranks: sums over threads round otherwise
    try:
        return here("train.py", "configs/ci.py", *arguments)
    finally:
        torch.set_num_threads(threads)


def torchrun(ranks: int, *options) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone", *options]


# ---------------------------------------------------------------------------------------------------------------------
# Processes


class Processes:
    """Ranks of a run, each in a process of its own, that share a store as under torchrun, which outlives them."""

    def __init__(self, log: Path):
        self.log, self.all = log, []
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        self.store = dist.TCPStore("localhost", self.port, is_master=True, wait_for_workers=False)

    def start(self, arguments, ranks=1, target=None, die=()):
        """Start the ranks of a run; they append their output to the log. Or of target(*arguments) instead.

        die  (rank, signal, function, call): what this rank sends itself when it calls the function so often
        """
        context = warm_up()
        for rank in range(ranks):
            self.all.append(context.Process(target=as_rank, daemon=True, args=(
                rank, ranks, self.port, str(self.log), target or train_ci, list(map(str, arguments)), die)))
            self.all[-1].start()

    def wait(self) -> list[int]:
        """Wait until all have ended -> their exit statuses, negative for a signal."""
        for process in self.all:
            process.join(LIMIT)
            assert process.exitcode is not None, self.log.read_text()
        ended, self.all = self.all, []
        return [process.exitcode for process in ended]

    def run(self, *arguments, **options) -> list[int]:
        self.start(*arguments, **options)
        return self.wait()

    def kill(self):
        for process in self.all:
            process.kill()
        return self.wait()


def warm_up():
    """Start the fork server, with all imports done, also what our modules import late -> its context."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runs"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([ROOT, os.path.dirname(os.path.abspath(__file__))]))
        forkserver.ensure_running()
    return context


def as_rank(rank: int, ranks: int, port: int, log: str, target, arguments, die):
    """Be a rank of torchrun's, which does target(*arguments)."""
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost",
                       "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if die and die[0] == rank:
        die_at(*die[1:])
    target(*arguments)


def train_ci(*arguments):
    """What `python train.py configs/ci.py ...` does."""
    os.chdir(ROOT)
    sys.argv = ["train.py", "configs/ci.py", *arguments]
    cli.run(train.main)


def command(name: str, *arguments):
    """start() in the folder of the repository."""
    os.chdir(ROOT)
    start(name, *arguments)


def die_at(name: str, function: str, call: int):
    """Have this process send itself a signal when it calls a function, "train.loss_of", for the n-th time."""
    module, attribute = function.rsplit(".", 1)
    module = importlib.import_module(module)
    original, calls = getattr(module, attribute), 0

    def counted(*args, **options):
        nonlocal calls
        calls += 1
        if calls == call:
            print(f"{name} at call {call} of {function}", flush=True)
            os.kill(os.getpid(), getattr(signal, name))
        return original(*args, **options)

    setattr(module, attribute, counted)


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves


def weights(folder, step=20):
    return torch.load(f"{folder}/run/step-{step:08d}.pt", weights_only=True)


def metrics(folder, name) -> list[float]:
    """All values of a name, in the order of the steps."""
    lines = map(json.loads, Path(folder, "run", "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def assert_same_run(a, b, step=20):
    """Two runs ended alike, to the bit: weights, moments, average, loss scale and log."""
    a, b = weights(a, step), weights(b, step)
    a.pop("config"), b.pop("config")
    assert_equal_states(a, b)


def assert_equal_states(a, b):
    """To the bit, through nested dicts and lists."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_states(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal_states(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def keep(folder, *steps):
    """Leave only some checkpoints of a run."""
    for path in Path(folder, "run").glob("step-*.pt"):
        if int(path.stem.removeprefix("step-")) not in steps:
            path.unlink()


def few_labels(world, folder, n: int) -> Path:
    """A list of the first labels of a world, which are quick to encode."""
    (folder / "labels").mkdir()
    for path in sorted(Path(world, "labels").iterdir())[:n]:
        (folder / "labels" / path.name).symlink_to(path)
    return folder / "labels"


# ---------------------------------------------------------------------------------------------------------------------
# Fixtures; conftest.py makes them known


def made_once(factory, name: str, make) -> Path:
    """A folder that make(folder) fills, once for all workers of pytest-xdist."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / name
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory):
    """(folder, what it printed) of a whole run of configs/ci.py, with its checkpoints of steps 5, 10, 15 and 20."""

    def make(folder):
        done = train_here(*ci_options(world, folder), "--keep=9")
        assert done.returncode == 0, done.stderr
        (folder / "out").write_text(done.stdout)

    folder = made_once(tmp_path_factory, "finished", make)
    return folder, (folder / "out").read_text()


BY_TWO = "--dtype=float64", "--max_steps=10", "--prompts=()", "--validation=1", "--save_every=1", "--keep=99"


@pytest.fixture(scope="session")
def by_two(world, tmp_path_factory):
    """The folder of a run of ten steps by two ranks of torchrun, in float64, with a checkpoint of every step."""

    def make(folder):
        options = [*ci_options(world, folder), *BY_TWO, "--batch_size=2"]
        done = subprocess.run([*torchrun(2), "train.py", "configs/ci.py", *options], cwd=ROOT, text=True,
                              capture_output=True, timeout=LIMIT, env=ONE_THREAD)
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "by-two", make)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run's folder, to go on from."""
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def processes(tmp_path):
    """Ranks of a run in processes of their own. None outlives its test."""
    processes = Processes(tmp_path / "log")
    yield processes
    processes.kill()


if __name__ == "__main__":
    rank, name, function, call, *sys.argv = sys.argv[1:]
    if os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        die_at(name, function, int(call))
    cli.run(train.main)
