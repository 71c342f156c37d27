import os
import subprocess
import sys
import time

import pytest
import torch

import toy
from checkpoint import Settings, build, save
from config import PRESETS

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture
def run():
    """Run a script of the repository as a user would: run("sample.py", ...) -> the finished process."""

    def run(*command, **options):
        return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True,
                              timeout=300, **options)

    return run


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    """A checkpoint of the micro model with random weights in every layer, 4 frames of 32x32."""
    torch.manual_seed(0)
    model = build(PRESETS["micro"], Settings(prediction="v", zero_snr=True, spacing="trailing", frames=4,
                                                   width=32, height=32, fps=8, fps_trained=(0, 4, 8, 120),
                                                   grid_trained=True, latent_scale=1.0))
    for p in model.unet.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    path = str(tmp_path_factory.mktemp("micro") / "micro.safetensors")
    save(model, path)
    return path


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


def ci_options(world, folder):
    return [f"--toy={world}", f"--encoded={folder}/encoded", f"--out_dir={folder}/run"]


def launch(arguments, ranks=1, **options):
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *torchrun, "train.py", "configs/ci.py", *arguments], cwd=ROOT, text=True,
                          capture_output=True, timeout=300, env=environment, **options)


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


def start(arguments, ranks, log):
    """A run in the background, its output appended to a file."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
    with open(log, "a") as out:
        return subprocess.Popen([sys.executable, *torchrun, "train.py", "configs/ci.py", *arguments], cwd=ROOT,
                                stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for(log, text, process):
    while text not in log.read_text() and process.poll() is None:
        time.sleep(0.01)
