"""lab/evals/mine.py: the nearest clip by a loop, what the VAE has not seen, and the command on a model that trained."""

import numpy as np
import pytest
import torch
from footage import Drawn, animation
from PIL import Image
from runs import train_here

from clips.lists import Items
from clips.samples import Spec
from lab.evals.mine import Clip, distances, read_clips, small, unseen


def test_distances_are_the_least_over_starts():
    rng = torch.Generator().manual_seed(0)
    made, clip = torch.rand(3, 4, 64, generator=rng), torch.rand(7, 64, generator=rng)
    expected = [min(((m - clip[s : s + 4]) ** 2).mean().item() for s in range(4)) for m in made]
    assert distances(made, clip).tolist() == pytest.approx(expected)
    assert distances(clip[None, 2:6], clip).item() == 0


def test_small_is_the_mean_of_squares_in_gray():
    frames = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    gray = [np.asarray(Image.fromarray(f.permute(1, 2, 0).numpy()).convert("L"), float) for f in frames]
    expected = np.stack([g.reshape(8, 4, 8, 4).mean((1, 3)).ravel() for g in gray])
    assert np.abs(small(frames).numpy() - expected).max() < 1


def test_frames_that_were_trained_on_do_not_count():
    pool = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 2, 2)
    clips = [Clip("a", 8, pool, torch.cat([pool[2:4], pool[:1] + 9])), Clip("b", 8, pool, pool[:3])]
    (rest,) = unseen(clips, pool)
    assert rest.unique().tolist() == [9]


def test_a_clip_has_the_frames_that_fit_into_it(tmp_path):
    """Four at 8 FPS last from 0 to 0.375 s, and so fit into 0.4 s."""
    frames = [Drawn(np.full((32, 32, 4), [50 * t, 0, 0, 255], np.uint8)) for t in range(4)]
    for name in "ab":
        (tmp_path / f"{name}.webp").write_bytes(animation("webp", 32, 32, frames))
    items, spec = Items("video", str(tmp_path), "from_names"), Spec(frames=4, width=32, height=32, fps_values=(8,))
    clips = read_clips(items, spec, 9)
    assert [(len(clip.frames), len(clip.between)) for clip in clips] == [(4, 3)] * 2


def test_a_model_of_three_stickers_is_graded(tmp_path, run, micro):
    """Trained for one step, so that the command has all it asks for; a model that tells nothing is refused."""
    for n, name in enumerate(("red", "green", "blue")):
        frames = [Drawn(np.full((32, 32, 4), [*np.eye(3, dtype=int)[n] * 20 * t, 255], np.uint8)) for t in range(12)]
        (tmp_path / f"{name}.webp").write_bytes(animation("webp", 32, 32, frames))
    (tmp_path / "vae.py").write_text('train = "vae"\nmodel = "micro"\nmax_steps = 1\nbatch_size = 2\nframe_pool = 9')
    done = train_here("--toy=", f"--video={tmp_path}", "--captions=from_names", f"--vae={tmp_path}/vae.py",
                      "--mix={'video': 1}", "--max_steps=1", "--prompts=()", f"--out_dir={tmp_path}/run",
                      f"--encoded={tmp_path}/encoded")
    assert done.returncode == 0, done.stderr
    done = run("lab.evals.mine", tmp_path, "--ckpt", tmp_path / "run/model.safetensors", "--steps", 1, "--sheet",
               tmp_path / "sheet.png")
    assert done.returncode == 0, done.stderr
    assert " dB on " in done.stdout and " of 3, " in done.stdout and "ddim, 1 steps" in done.stdout
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] * sheet.size[1] >= 6 * 4 * 32 * 32
    done = run("lab.evals.mine", tmp_path, "--ckpt", micro)
    assert done.returncode == 2 and "ckpt must be a model that train.py trained" in done.stderr
