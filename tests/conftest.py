import os
import subprocess
import sys

import pytest
import torch

import toy
import train
from checkpoint import Settings, build, save

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
    model = build(train.PRESETS["micro"], Settings(prediction="v", zero_snr=True, spacing="trailing", frames=4,
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
