"""eval.py: its commands on real files, against what libraries compute by hand."""

import json
import os
import subprocess
import sys

import av
from lab import eval as evaluate
import numpy as np
import open_clip
import pytest
import torch
from conftest import ROOT
from PIL import Image
from skimage.metrics import structural_similarity

from clips.media import write_video
from lab import toy
from sample import decode
from sd.checkpoint import load


def test_true_renders_get_full_marks(monkeypatch):
    """With a renderer in place of a model the table is full, and the speeds are those of the world."""

    def render(model, jobs, fps=8, **options):
        for prompt, seed in jobs:
            color, shape, direction, background = toy.expected(prompt)
            rng = np.random.default_rng([seed, *prompt.encode()])
            times = rng.uniform(0, 5 - 15 / fps) + np.arange(16) / fps
            yield toy.draw(color, shape, background, toy.trajectory(direction, times, rng))

    monkeypatch.setattr(evaluate, "sample_all", render)
    right, n, cuts, failures, tracks = evaluate.grade_prompts(None, "test", 2)
    assert n == 12 * 4 * 2 and cuts == 0 and not failures and set(right.values()) == {n}
    far = evaluate.trajectory_distances(tracks, "test", 2, fps=8)
    assert far["model"] < 1.2 * far["true"]
    tracks[:, :32] += 5  # px
    assert evaluate.trajectory_distances(tracks, "test", 2, fps=8)["model"] > far["model"] + 32 * 20
    for fps, (speed, seen, _) in evaluate.grade_fps(None, "val", (4, 8, 15, 30)).items():
        assert speed == pytest.approx(10 / fps, rel=0.02) and seen == 1


@pytest.mark.parametrize("split", ["test", pytest.param("train", marks=pytest.mark.slow)])
def test_grader_is_right_after_the_vae_and_h264(tmp_path, split):
    """In at least 99 of 100 true renders: what a perfect denoiser would be graded on."""
    model, rng, right = load(evaluate.SHIPPED), np.random.default_rng(0), 0
    for scene in toy.scenes(split):
        clip = torch.from_numpy(toy.true_render(scene, rng, 16, fps=4)).permute(0, 3, 1, 2)
        mean, _ = evaluate.encode_frames(model.vae, clip).chunk(2, dim=1)
        video = decode(model, mean[None] * model.settings.latent_scale)[0]
        write_video(str(tmp_path / "clip.mp4"), video, 4, {})
        with av.open(str(tmp_path / "clip.mp4")) as file:
            seen = toy.grade(np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]))
        right += (seen.color, seen.shape, seen.direction, seen.background, seen.wrong_cut) == (*scene, False)
    print(f"{right} of {len(toy.scenes(split))} right")
    assert right >= 0.99 * len(toy.scenes(split))


def test_toy_command(run, micro, tmp_path):
    done = run("lab.eval", "toy", "--ckpt", micro, "--split", "val", "--seeds", 1, "--steps", 1, "--no_fps",
               "--json", tmp_path / "r.jsonl", "--failures", tmp_path / "f.png")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.jsonl").read_text())
    assert result["trajectories"]["model"] > result["trajectories"]["true"] > 0
    assert result["videos"] == 24 and result["shape"]["count"] <= 24 and "wrong cuts" in done.stdout
    assert Image.open(tmp_path / "f.png").size == (4 * 34, 24 * 34)
    for options, says in ((["--ckpt", "nowhere.safetensors"], "nowhere.safetensors"),
                          (["--eta", "2"], "--eta: 2 is not in 0..1"),
                          (["--failures", "/dev/null/f.png"], "/dev/null/f.png cannot be written"),
                          (["--failures", tmp_path / "f.txt"], "must end in .png"),
                          (["--json", "/dev/null/r.jsonl"], "/dev/null/r.jsonl cannot be written"),
                          (["--seeds", "0"], "--seeds: 0 is less than 1"),
                          (["--device", "cuda"], "--device cuda is not here")):
        done = run("lab.eval", "toy", *options)
        assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Fréchet video distance. The I3D file cannot be downloaded here: a small TorchScript network with its signature.


class StandIn(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv3d(3, 12, (3, 8, 8), stride=(2, 4, 4))

    def forward(self, video, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert rescale and resize and return_features
        return self.conv(video / 127.5 - 1).relu().mean(dim=(2, 3, 4))


@pytest.fixture(scope="module")
def i3d(tmp_path_factory):
    torch.manual_seed(0)
    path = str(tmp_path_factory.mktemp("i3d") / "i3d.pt")
    torch.jit.script(StandIn()).save(path)
    return path


def write_clips(folder, rng, count=48, noise=0.0):
    """True renders of 16 frames, with noise of so many levels."""
    for n in range(count):
        color, shape, direction = toy.triples("train")[int(rng.integers(54))]
        times = rng.uniform(0, 2) + np.arange(16) / 8
        clip = toy.draw(color, shape, "black", toy.trajectory(direction, times, rng)).astype(float)
        clip = (clip + rng.normal(0, noise, clip.shape)).clip(0, 255).astype(np.uint8)
        write_video(str(folder / f"{n:03d}.mp4"), clip, 8, {})


def fvd(run, i3d, *arguments):
    done = run("lab.eval", "fvd", *arguments, "--i3d", i3d, "--seeds", 2)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[1]), done


def test_fvd_grows_with_the_distortion(run, i3d, tmp_path):
    """Two halves of one world are near each other; noise takes them apart, more of it further. Features are cached."""
    rng = np.random.default_rng(0)
    for name, noise in (("real", 0), ("other", 0), ("noisy", 20), ("noisier", 60)):
        (tmp_path / name).mkdir()
        write_clips(tmp_path / name, rng, noise=noise)
    cache = ["--cache", tmp_path / "cache", "--size", "64x64"]
    far = [fvd(run, i3d, tmp_path / "real", tmp_path / name, *cache)[0] for name in ("other", "noisy", "noisier")]
    assert 10 * far[0] < far[1] < far[2]
    assert fvd(run, i3d, tmp_path / "real", tmp_path / "real", *cache)[0] == pytest.approx(0, abs=1e-6)
    (folder,) = (tmp_path / "cache").iterdir()
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again, done = fvd(run, i3d, tmp_path / "real", tmp_path / "noisier", *cache)
    assert again == far[2] and files == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert "below 10,000 videos" in done.stderr and "next to nothing" not in done.stderr


def test_fvd_of_encoded_clips_and_of_what_cannot_be_used(run, i3d, finished, micro, tmp_path):
    cache = ["--cache", tmp_path / "cache", "--frames", 4, "--size", "32x32"]
    both, ckpt = [finished[0] / "encoded", finished[0] / "encoded"], ["--ckpt", micro]
    _, done = fvd(run, i3d, *both, *ckpt, *cache, "--fps", 8)
    assert "8 real and 8 generated" in done.stdout and "says next to nothing" in done.stderr
    for options, says in (([*ckpt], "at 4, 8 FPS: ask for that"), (["--fps", 8], "say with --ckpt"),
                          ([*ckpt, "--fps", 8, "--frames", 16], "holds 4 frames of 32x32")):
        done = run("lab.eval", "fvd", *both, "--i3d", i3d, *cache, *options)
        assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1
    (tmp_path / "clips").mkdir()
    write_clips(tmp_path / "clips", np.random.default_rng(0), count=3)
    (tmp_path / "clips" / "001.mp4").write_bytes(b"no video")
    _, done = fvd(run, i3d, tmp_path / "clips", tmp_path / "clips", *cache)
    assert "skipped " in done.stderr and "2 real and 2 generated" in done.stdout
    done = run("lab.eval", "fvd", tmp_path / "clips", tmp_path / "clips", "--i3d", micro)
    assert done.returncode == 2 and "is not a TorchScript file" in done.stderr


def test_fvd_holds_no_more_of_many_videos(i3d, tmp_path):
    """100 clips more are 300 MB more, if they are kept."""
    rng, peaks = np.random.default_rng(0), []
    for n in range(10):  # long enough for a hundred starts each
        write_video(str(tmp_path / f"{n:03d}.mp4"), rng.integers(0, 255, (116, 32, 32, 3), dtype=np.uint8), 8, {})
    for count in (20, 120):
        lines = [json.dumps({"path": f"{n % 10:03d}.mp4", "caption": ""}) for n in range(count)]
        (tmp_path / "list.jsonl").write_text("\n".join(lines))
        child = subprocess.Popen([sys.executable, "-m", "lab.eval", "fvd", tmp_path / "list.jsonl", tmp_path / "list.jsonl",
                                  "--i3d", i3d, "--seeds", "1", "--cache", tmp_path / f"cache {count}"], cwd=ROOT,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        assert status == 0 and len(list((tmp_path / f"cache {count}").rglob("*.npy"))) > count / 2
        peaks.append(usage.ru_maxrss / 1024)  # MiB
    assert peaks[1] < peaks[0] + 60


# ---------------------------------------------------------------------------------------------------------------------
# CLIP score


def test_clip_score_is_open_clips(run, tmp_path):
    """By hand: 100 x the cosine of normed features, mean over frames, then over videos. Random weights, from a file."""
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("RN50")
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    (tmp_path / "clips").mkdir()
    write_clips(tmp_path / "clips", np.random.default_rng(0), count=2)
    prompts = ["a red circle", "snow on a mountain"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    done = run("lab.eval", "clip", tmp_path / "clips", "--prompts", tmp_path / "prompts.txt", "--model", "RN50",
               "--pretrained", tmp_path / "clip.pt", "--frames", 4)
    assert done.returncode == 0, done.stderr
    model.eval()
    expected = []
    for n, prompt in enumerate(prompts):
        frames = evaluate.spaced_frames(str(tmp_path / "clips" / f"{n:03d}.mp4"), 4)
        with torch.no_grad():
            text = model.encode_text(open_clip.get_tokenizer("RN50")([prompt]))[0]
            images = [model.encode_image(preprocess(frame)[None])[0] for frame in frames]
        expected.append(np.mean([100 * torch.cosine_similarity(image, text, dim=0).item() for image in images]))
    assert float(done.stdout.split()[2]) == pytest.approx(np.mean(expected), abs=0.006)
    (tmp_path / "prompts.txt").write_text("one")
    done = run("lab.eval", "clip", tmp_path / "clips", "--prompts", tmp_path / "prompts.txt")
    assert done.returncode == 2 and "has 1 prompts for 2 videos" in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The VAE


def test_vae_scores_are_scikit_images(run):
    """Inside and border by hand, from the reconstructions."""
    model = load(evaluate.SHIPPED)
    frames = next(iter(evaluate.toy_clips(4)))
    scores = evaluate.vae_scores(model, [frames])
    true = frames.numpy() / 255
    for how, back in zip(scores, evaluate.reconstructions(model, frames)):
        back = back.numpy()
        inside = np.mean([structural_similarity(a, b, data_range=1.0, channel_axis=0, full=True)[1][:, 8:-8, 8:-8]
                          for a, b in zip(true, back.astype(float))])
        error = np.mean((true - back)[..., 8:-8, 8:-8] ** 2)
        assert scores[how]["SSIM inside"] == pytest.approx(inside, abs=1e-4)
        assert scores[how]["PSNR inside"] == pytest.approx(-10 * np.log10(error), abs=1e-3)
        rim = ((true - back) ** 2).sum() - ((true - back)[..., 8:-8, 8:-8] ** 2).sum()
        assert scores[how]["PSNR border"] == pytest.approx(-10 * np.log10(rim / (4 * 3 * (64**2 - 48**2))), abs=0.01)
    done = run("lab.eval", "vae", "--clips", 1, "--frames", 4)
    assert done.returncode == 0 and "one by one" in done.stdout and "stitched" in done.stdout, done.stderr
