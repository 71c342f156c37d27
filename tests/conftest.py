import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of these tests, and of what they start: the same on every machine

import pytest
import torch
from references import FAMILIES, reference, save_reference

import sd
from clips.encode import encode
from clips.samples import Spec
from lab import toy
from sd.presets import PRESETS

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run two at a time: threads of both on the same cores would only wait
    torch.set_num_threads(1)


def script(name, *arguments, **options):
    """Run a script of the repository as a user would -> the finished process."""
    return subprocess.run([sys.executable, name, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, **options)


@pytest.fixture
def run(monkeypatch):
    """run("sample.py", ...) or run("lab.eval", ...) is what script() is, without the start of Python and the imports: most of its time."""

    def run(name, *arguments):
        out, err, status = io.StringIO(), io.StringIO(), 0
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.chdir(ROOT)
        with redirect_stdout(out), redirect_stderr(err):
            try:
                if name.endswith(".py"):
                    runpy.run_path(name, run_name="__main__")
                else:
                    runpy.run_module(name, run_name="__main__", alter_sys=True)
            except SystemExit as end:
                status = end.code or 0
        return subprocess.CompletedProcess(sys.argv, status, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    """A checkpoint of the micro model with random weights in every layer, 4 frames of 32x32."""
    torch.manual_seed(0)
    model = sd.build(PRESETS["micro"], sd.Settings(prediction="v", zero_snr=True, spacing="trailing", frames=4,
                                                   width=32, height=32, fps=8, fps_trained=(0, 4, 8, 120),
                                                   grid_trained=True, latent_scale=1.0))
    for p in model.unet.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    path = str(tmp_path_factory.mktemp("micro") / "micro.safetensors")
    sd.save(model, path)
    return path


@pytest.fixture(scope="session", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(the references, our model with the same weights)."""
    folder = save_reference(request.param, tmp_path_factory.mktemp("reference"))
    return reference(request.param), sd.load(folder)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small toy world, rendered once."""
    folder = str(tmp_path_factory.mktemp("toy") / "world")
    toy.render(folder, clips=8, images=4, captioned=8, size=32)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Runs of configs/ci.py


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory):
    """A whole run of configs/ci.py."""
    folder = tmp_path_factory.mktemp("ci")
    done = launch(ci_options(world, folder))
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture(scope="session")
def by_two(world, finished, tmp_path_factory):
    """The same run by two ranks, with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(finished[0] / "encoded", folder / "encoded")
    options = ["--prompts=()", "--batch_size=2", "--save_every=1", "--keep=99"]
    done = launch([*ci_options(world, folder), *options], ranks=2)
    assert done.returncode == 0, done.stderr
    return folder


def ci_options(world, folder):
    return [f"--toy={world}", f"--encoded={folder}/encoded", f"--out_dir={folder}/run"]


def command(arguments, ranks, *options):
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone", *options]
    return [sys.executable, *(torchrun if ranks > 1 else []), "train.py", "configs/ci.py", *arguments]


def launch(arguments, ranks=1):
    """A run to its end."""
    return subprocess.run(command(arguments, ranks), cwd=ROOT, text=True, capture_output=True, timeout=300,
                          env=ONE_THREAD)


def weights(folder, step=20):
    return torch.load(f"{folder}/run/step-{step:08d}.pt", weights_only=True)


def assert_equal_states(a, b):
    """To the bit, through nested dicts and lists."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_states(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b):
            assert_equal_states(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.fixture
def start():
    """start(arguments, ranks, log, *options): a run in the background, its output appended to a file; options are
    torchrun's. None outlives its test."""
    started = []

    def start(arguments, ranks, log, *options):
        with open(log, "a") as out:
            started.append(subprocess.Popen(command(arguments, ranks, *options), cwd=ROOT, stdout=out, stderr=out,
                                            env=ONE_THREAD))
        return started[-1]

    yield start
    for process in started:
        kill_all(process)


def kill_all(process):
    """torchrun and its workers, which are in other process groups."""
    mine = next(argument for argument in process.args if argument.startswith("--out_dir="))
    for pid in running(mine):
        os.kill(pid, signal.SIGKILL)
    process.wait(60)


def running(argument: str, rank: int | None = None) -> list[int]:
    """Process ids of a run with an argument, or of one of its ranks."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as command, open(f"/proc/{pid}/environ") as environment:
                mine = argument in command.read().split("\0")
                if mine and (rank is None or f"\0RANK={rank}\0" in environment.read()):
                    found.append(int(pid))
        except OSError:
            continue  # it has ended meanwhile, or is somebody else's
    return found


def worker(folder, rank: int) -> int:
    """Process id of a rank of the run in a folder."""
    (pid,) = running(f"--out_dir={folder}/run", rank)
    return pid


def wait_for(log, step: int, process, start=0):
    """Until a step or a later one stands in a log behind a place, or the process has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and not any(
            int(n) >= step for n in re.findall(r"step (\d+)/", log.read_text()[start:])):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Samples of the toy world

SPEC = Spec(4, 32, 32, fps_values=(4, 8), starts=2, draws=3, seed=5)


@pytest.fixture(scope="session")
def lists(world):
    files = {"video": "videos.csv", "label": "labels", "caption": "images.jsonl"}
    return {source: os.path.join(world, name) for source, name in files.items()}


@pytest.fixture(scope="session")
def encoded(lists, micro, tmp_path_factory):
    """A folder of samples encoded ahead."""
    out = str(tmp_path_factory.mktemp("encoded") / "clips")
    encode(sd.load(micro), lists, out, SPEC)
    return out


@pytest.fixture
def bad_lists(lists, tmp_path):
    """The toy world with one of four captioned images missing and one broken."""
    lines = [json.loads(line) for line in open(lists["caption"])]
    for line in lines:
        line["path"] = os.path.join(os.path.dirname(lists["caption"]), line["path"])
    lines[2]["path"], lines[5]["path"] = str(tmp_path / "missing.png"), str(tmp_path / "broken.png")
    (tmp_path / "broken.png").write_text("no image")
    (tmp_path / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lists | {"caption": str(tmp_path / "images.jsonl")}
