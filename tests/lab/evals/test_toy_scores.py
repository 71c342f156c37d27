"""Grading a model: full marks for a perfect one, and the grader after what a perfect denoiser would go through."""

import json

import av
import numpy as np
import pytest
import torch
from PIL import Image

import sd
from clips.write import write_video
from lab import toy
from lab.evals import toy as evaluate
from sample import SHIPPED, Request, decode
from sd.vae import encode_frames


def test_true_renders_get_full_marks(monkeypatch):
    """With a renderer in place of a model the table is full, and the speeds are those of the world."""

    def render(model, jobs, request, batch_size):
        fps = request.fps or 8
        for prompt, seed in jobs:
            color, shape, direction, background = toy.expected(prompt)
            rng = np.random.default_rng([seed, *prompt.encode()])
            times = rng.uniform(0, 5 - 15 / fps) + np.arange(16) / fps
            yield toy.draw(color, shape, background, toy.trajectory(direction, times, rng))

    monkeypatch.setattr(evaluate, "sample_all", render)
    report = evaluate.grade_prompts(None, "test", 1, Request())
    assert report.videos == 12 * 4 and report.wrong_cuts == 0 and not report.failures
    assert set(report.right) == set(evaluate.ANSWERS) and set(report.right.values()) == {report.videos}
    far = evaluate.trajectory_distances(report.tracks, "test", 1, fps=8)
    assert far["model"] < 1.2 * far["true"]
    report.tracks[:, :32] += 5  # px
    assert evaluate.trajectory_distances(report.tracks, "test", 1, fps=8)["model"] > far["model"] + 32 * 20
    for fps, (speed, seen, _) in evaluate.grade_fps(None, "val", (4, 8, 15, 30), Request()).items():
        assert speed == pytest.approx(10 / fps, rel=0.02) and seen == 1


@pytest.mark.parametrize("split", ["test", pytest.param("train", marks=pytest.mark.slow)])
def test_grader_is_right_after_the_vae_and_h264(tmp_path, split):
    """In at least 99 of 100 true renders: what a perfect denoiser would be graded on."""
    model, rng, right = sd.load(SHIPPED), np.random.default_rng(0), 0
    for scene in toy.scenes(split):
        clip = torch.from_numpy(toy.true_render(scene, rng, 16, fps=4)).permute(0, 3, 1, 2)
        mean, _ = encode_frames(model.vae, clip).chunk(2, dim=1)
        video = decode(model, mean[None] * model.settings.latent_scale)[0]
        write_video(str(tmp_path / "clip.mp4"), video, 4, {})
        with av.open(str(tmp_path / "clip.mp4")) as file:
            seen = toy.grade(np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]))
        right += (seen.color, seen.shape, seen.direction, seen.background, seen.wrong_cut) == (*scene, False)
    print(f"{right} of {len(toy.scenes(split))} right")
    assert right >= 0.99 * len(toy.scenes(split))


def test_the_command(run, micro, tmp_path):
    done = run("lab.evals.toy", "--ckpt", micro, "--split", "val", "--seeds", 1, "--steps", 1, "--dtype", "float32",
               "--json", tmp_path / "r.jsonl", "--failures", tmp_path / "f.png")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.jsonl").read_text())
    assert result["trajectories"]["model"] > result["trajectories"]["true"] > 0
    assert result["videos"] == 24 and result["shape"]["count"] <= 24 and "wrong cuts" in done.stdout
    assert result["dtype"] == "float32" and result["ckpt"] == "micro.safetensors"
    assert [name for name in result if name.startswith("fps")] == [f"fps {n}" for n in (4, 8, 15, 30, 60, 120, 0)]
    assert Image.open(tmp_path / "f.png").size == (4 * 34 - 2, 24 * 34 - 2)


@pytest.mark.parametrize("options, says", [
    (["--ckpt", "nowhere.safetensors"], "nowhere.safetensors"),
    (["--eta", "2"], "eta must be in 0..1, got 2"),
    (["--failures", "/dev/null/f.png"], "/dev/null"),
    (["--failures", "f.txt"], "failures must end in .png, got f.txt"),
    (["--json", "/dev/null/r.jsonl"], "/dev/null"),
    (["--seeds", "0"], "seeds must be >= 1, got 0"),
    (["--split", "tset"], "split must be one of test, val, train, got 'tset'"),
    (["--device", "cuda"], "device cuda is not here"),
])
def test_mistakes_are_told_in_one_line(run, options, says):
    done = run("lab.evals.toy", *options)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
