import json
import os
import signal
import subprocess
import sys

if "gpu" not in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:  # `-m gpu`; workers are told by their parent
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of these tests, and of what they start: the same on every machine

import pytest
import torch
from references import FAMILIES, reference, save_reference
from runs import ONE_THREAD, ROOT, by_two, copied, finished, here, made_once, processes

import sd
from clips.encode import encode
from clips.samples import Spec
from lab import toy
from sd.presets import PRESETS

__all__ = ["ONE_THREAD", "ROOT", "by_two", "copied", "finished", "processes"]  # of runs.py, for all tests

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a script's `pytest &`: what tests start would, too
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:  # tests run two at a time: threads of both on the same cores would only wait
    torch.set_num_threads(1)


def script(name, *arguments, **options):
    """Run a script of the repository as a user would -> the finished process."""
    return subprocess.run([sys.executable, name, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, **options)


@pytest.fixture
def run():
    """run("sample.py", ...) or run("lab.evals.toy", ...): as script(), without the start of Python and the imports."""
    return here


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

    def make(folder):
        toy.render(str(folder / "world"), clips=8, images=4, captioned=8, size=32)

    return str(made_once(tmp_path_factory, "toy", make) / "world")


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
