"""The Fréchet video distance on real files. The I3D file cannot be downloaded here: a small TorchScript network with
its signature takes its place."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import sd
from clips.encode import encode
from clips.samples import Spec
from clips.write import write_video
from lab import toy
from lab.evals import fvd
from lab.evals.fvd import Detector


class StandIn(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv3d(3, 12, (3, 8, 8), stride=(2, 4, 4))

    def forward(self, video, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert rescale and resize and return_features
        return 100 * self.conv(video / 127.5 - 1).relu().mean(dim=(2, 3, 4))


@pytest.fixture(scope="module")
def i3d(tmp_path_factory):
    torch.manual_seed(0)
    path = str(tmp_path_factory.mktemp("i3d") / "i3d.pt")
    torch.jit.script(StandIn()).save(path)
    return path


def write_clips(folder, rng, count=24, noise=0.0):
    """True renders of 16 frames, with noise of so many levels."""
    folder.mkdir()
    for n in range(count):
        color, shape, direction = toy.triples("train")[int(rng.integers(54))]
        times = rng.uniform(0, 2) + np.arange(16) / 8
        clip = toy.draw(color, shape, "black", toy.trajectory(direction, times, rng)).astype(float)
        clip = (clip + rng.normal(0, noise, clip.shape)).clip(0, 255).astype(np.uint8)
        write_video(str(folder / f"{n:03d}.mp4"), clip, 8, {})


@pytest.fixture
def distance(run, i3d, tmp_path):
    """distance(real, gen, *options) -> (FVD, the finished command)."""

    def distance(*arguments):
        done = run("lab.evals.fvd", *arguments, "--i3d", i3d, "--cache", tmp_path / "cache")
        assert done.returncode == 0, done.stderr
        return float(done.stdout.split()[1]), done

    return distance


def test_it_grows_with_the_distortion(distance, tmp_path):
    """Two halves of one world are near each other; noise takes them apart, more of it further. Features are cached."""
    rng, options = np.random.default_rng(0), ("--size", "64x64", "--seeds", 1)
    for name, noise in (("real", 0), ("other", 0), ("noisy", 20), ("noisier", 60)):
        write_clips(tmp_path / name, rng, noise=noise)
    far = [distance(tmp_path / "real", tmp_path / name, *options)[0] for name in ("other", "noisy", "noisier")]
    assert 10 * far[0] < far[1] < far[2]
    assert distance(tmp_path / "real", tmp_path / "real", *options)[0] == pytest.approx(0, abs=1e-6)
    (folder,) = (tmp_path / "cache").iterdir()
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again, done = distance(tmp_path / "real", tmp_path / "noisier", *options)
    assert again == far[2] and files == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert "below 10,000 videos" in done.stderr and "next to nothing" not in done.stderr


@pytest.fixture(scope="module")
def encoded(world, micro, tmp_path_factory):
    """The 8 clips of a small world, encoded."""
    folder = str(tmp_path_factory.mktemp("encoded") / "clips")
    encode(sd.load(micro), {"video": f"{world}/videos.csv"}, folder, Spec(4, 32, 32, (4, 8)))
    return folder


def test_encoded_clips(distance, encoded, micro):
    _, done = distance(encoded, encoded, "--ckpt", micro, "--frames", 4, "--size", "32x32", "--fps", 8, "--seeds", 2)
    assert "the least of 2 seeds" in done.stdout and "8 real and 8 generated" in done.stdout
    assert "says next to nothing" in done.stderr


def test_what_cannot_be_used_is_named_and_left_out(distance, tmp_path):
    write_clips(tmp_path / "clips", np.random.default_rng(0), count=3)
    (tmp_path / "clips" / "001.mp4").write_bytes(b"no video")
    _, done = distance(tmp_path / "clips", tmp_path / "clips", "--frames", 4, "--size", "32x32")
    assert "001.mp4: " in done.stderr and "2 real and 2 generated" in done.stdout


def test_features_that_another_run_has_kept_meanwhile_are_no_error(i3d, tmp_path, monkeypatch):
    clips = list(np.random.default_rng(0).integers(0, 255, (3, 4, 32, 32, 3), dtype=np.uint8))
    expected = Detector(i3d, str(tmp_path / "other"), "cpu")(clips)

    def replace(part, path):
        os.rename(part, path)
        raise FileNotFoundError(2, "No such file or directory")  # what the slower of two processes gets

    monkeypatch.setattr(fvd.os, "replace", replace)
    assert torch.equal(Detector(i3d, str(tmp_path / "cache"), "cpu")(clips), expected)


def test_it_holds_no_more_of_many_videos(i3d, tmp_path):
    """40 clips more are 126 MB more, if they are kept."""
    rng, peaks = np.random.default_rng(0), []
    for n in range(4):  # long enough for many starts each
        write_video(str(tmp_path / f"{n}.mp4"), rng.integers(0, 255, (60, 16, 16, 3), dtype=np.uint8), 8, {})
    for count in (8, 48):
        lines = [json.dumps({"path": f"{n % 4}.mp4", "caption": ""}) for n in range(count)]
        (tmp_path / "list.jsonl").write_text("\n".join(lines))
        cache = tmp_path / f"cache {count}"
        child = subprocess.Popen([sys.executable, "-m", "lab.evals.fvd", tmp_path / "list.jsonl",
                                  tmp_path / "list.jsonl", "--i3d", i3d, "--seeds", "1", "--cache", cache], cwd=ROOT,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                 env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(child.pid, 0)
        assert status == 0 and len(list(cache.rglob("*.npy"))) > count / 2
        peaks.append(usage.ru_maxrss / 1024)  # MiB
    assert peaks[1] < peaks[0] + 50, peaks


@pytest.mark.parametrize("options, says", [
    (["--ckpt", "{micro}"], "at 4, 8 FPS: ask for that"),
    (["--fps", 8], "ckpt must be given"),
    (["--ckpt", "{micro}", "--fps", 8, "--frames", 16], "holds 4 frames of 32x32"),
    (["--ckpt", "{micro}", "--fps", 8, "--i3d", "{micro}"], "i3d must be a TorchScript file"),
    (["--size", "big"], "--size: must be WIDTHxHEIGHT, like 256x256, got 'big'"),
    (["--seeds", 0], "seeds must be >= 1, got 0"),
])
def test_mistakes_are_told_in_one_line(run, i3d, encoded, micro, options, says):
    given = [str(option).format(micro=micro) for option in options]
    done = run("lab.evals.fvd", encoded, encoded, "--i3d", i3d, "--frames", 4, "--size", "32x32", *given)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
