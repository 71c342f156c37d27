"""training/vae.py: the autoencoder's loss, its frames, and a run."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from footage import write_clip
from PIL import Image
from runs import ROOT, ci_options, metrics, train_here

import sd
from clips.encoded import fingerprint
from clips.lists import Items
from clips.samples import Spec
from training.config import read_config, stages
from training.setup import data_lists, make_model
from training.vae import Autoencoding, VAETask, frame_pool

CI = f"{ROOT}/configs/ci.py"
SPEC = Spec(4, 32, 32)


def make_task(world, rank=0, ranks=1, **options):
    cfg = dataclasses.replace(read_config([CI, f"--toy={world}"]), **options)
    torch.manual_seed(0)
    return VAETask(cfg, make_model(cfg), data_lists(cfg), SimpleNamespace(rank=rank, world=ranks))


def test_the_loss_is_reconstruction_and_kl(micro):
    """Against torch's own KL of two normal distributions, and a decoding of what the noise chooses."""
    model, cfg = sd.load(micro), read_config([CI, "--kl_weight=0.01"])
    images, eps = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        mean, logvar = model.vae.encode(images)
        theirs, ours = (torch.distributions.Normal(m, s) for m, s in ((mean, (logvar / 2).exp()), (0.0, 1.0)))
        kl = torch.distributions.kl_divergence(theirs, ours).mean(dim=(1, 2, 3))
        error = (model.vae.decode(mean + theirs.scale * eps) - images).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(Autoencoding(model, cfg)(images, eps), error + 0.01 * kl)


def test_a_step_is_the_same_however_it_is_cut(world):
    options = {"frame_pool": 32, "validation": 0}
    whole = make_task(world, batch_size=4, **options)
    ranks = [make_task(world, rank, 2, batch_size=2, **options) for rank in range(2)]
    for task in (whole, *ranks):
        task.begin(stages(task.cfg, task.ranks.world)[0], 3)
    parts = [rank.batch()[1] for rank in ranks]
    names, batch = whole.batch()
    assert names == ["frame"] * 4
    for n, tensor in enumerate(batch):
        assert torch.equal(tensor, torch.cat([part[n] for part in parts]))


def test_frames_come_from_all_sources_without_those_held_out(world):
    cfg = read_config([CI, f"--toy={world}"])
    lists = data_lists(cfg)
    pool = frame_pool(lists, 30, SPEC, which=slice(0, -2))
    assert pool.dtype == torch.uint8 and 24 <= len(pool) <= 45 and pool.shape[1:] == (3, 32, 32)
    held_out = frame_pool(lists, 6, SPEC, which=slice(-2, None))
    assert not any(torch.equal(a, b) for a in held_out for b in pool)
    with pytest.raises(ValueError, match="validation must leave something to train on, and video has 8 samples"):
        frame_pool(lists, 30, SPEC, which=slice(0, -8))


def test_frames_that_cannot_be_used_are_told(bad_lists, tmp_path, capsys):
    write_clip(tmp_path / "short.mp4", range(0, 60, 20))
    (tmp_path / "videos.jsonl").write_text('{"path": "short.mp4", "caption": "too short for four frames"}')
    pool = frame_pool({"caption": bad_lists["caption"]}, 8, SPEC)
    assert pool.shape == (6, 3, 32, 32)
    assert capsys.readouterr().err.count("warning: skipped caption") == 2
    shutil.copytree(bad_lists["label"], tmp_path / "labels")
    (next((tmp_path / "labels").iterdir()) / "broken.png").write_text("no image")
    assert len(frame_pool({"label": str(tmp_path / "labels")}, 500, SPEC))
    assert "/broken.png: not an image that can be read" in capsys.readouterr().err
    many = tmp_path / "many.jsonl"
    many.write_text('{"path": "missing.mp4", "caption": "x"}\n' * 120)
    with pytest.raises(ValueError, match="100 of 100 samples cannot be used, more than max_bad = 0.9"):
        frame_pool({"video": str(many)}, 120, SPEC, max_bad=0.9)
    with pytest.raises(ValueError, match="no frame of .*videos.jsonl can be used"):
        frame_pool({"video": str(tmp_path / "videos.jsonl")}, 8, SPEC)


def test_a_run_in_two_parts(world, run, tmp_path):
    """The VAE's run goes first, and nothing stale is trained on: neither other clips nor other captions."""
    shutil.copytree(world, tmp_path / "world")
    (tmp_path / "vae.py").write_text('train = "vae"\nmodel = "micro"\nmax_steps = 2\nbatch_size = 2\nframe_pool = 16')
    options = [*ci_options(tmp_path / "world", tmp_path), f"--vae={tmp_path}/vae.py", "--max_steps=2", "--prompts=()",
               "--sheet_clips=3", "--mix={'video': 1}"]
    done = train_here(*options, f"--toy={tmp_path}/unseen", "--dry_run")  # where the world is still to be rendered
    assert done.returncode == 0 and done.stdout.count(f"and what it takes to render {tmp_path}/unseen") == 2
    done = train_here(*options)
    assert done.returncode == 0, done.stderr
    for part in ("part 1 of 2: the VAE, 2 steps of ", "part 2 of 2: the UNet and text tower, 2 steps of ", "in all "):
        assert part in done.stdout
    first, last = (sd.load(f"{tmp_path}/run/{folder}model.safetensors") for folder in ("vae/", ""))
    assert fingerprint(first.vae) == fingerprint(last.vae)
    assert first.settings.latent_scale == last.settings.latent_scale != 1
    with Image.open(tmp_path / "run" / "sheet-00000002.png") as sheet:  # three clips, and below each what is made of it
        assert sheet.size == (4 * 34 - 2, 6 * 34 - 2)

    videos = tmp_path / "world" / "videos.csv"
    videos.write_text(videos.read_text().replace("moving", "going", 1))
    done = train_here(*options)
    assert done.returncode == 2 and "1 of 8 items changed since they were encoded (1 captions, 0 files)" in done.stderr
    assert run("clips.encode", tmp_path / "encoded", "--ckpt", tmp_path / "run/model.safetensors", "--update",
               "--video", videos).returncode == 0
    done = train_here(*options)
    assert done.returncode == 2 and "run/step-00000002.pt was trained on other clips or captions" in done.stderr
    assert done.stdout.count(", 0 steps of ") == 2 and "step 2/2" not in done.stdout  # the VAE's run is finished
    clips = Items("video", str(videos))
    shutil.copy(clips[0].path, clips[1].path)
    done = train_here(*options)
    assert done.returncode == 2 and "1 of 8 items changed since they were encoded (0 captions, 1 files)" in done.stderr
    assert "resume from" not in done.stdout  # told before the first part
    assert run("clips.encode", tmp_path / "encoded", "--ckpt", tmp_path / "run/model.safetensors", "--update",
               "--video", videos).returncode == 0
    done = train_here(*options)
    assert done.returncode == 2 and "run/vae/step-00000002.pt was trained on other clips or captions" in done.stderr


def test_vae_trains(world, tmp_path):
    done = train_here(*ci_options(world, tmp_path), "--train=vae", "--max_steps=40", "--frame_pool=64", "--lr=5e-3",
                      "--validation=2", "--sheet_every=40")
    assert done.returncode == 0, done.stderr
    losses = metrics(tmp_path, "loss_frame")
    assert np.mean(losses[-10:]) < 0.3 * losses[0] and len(metrics(tmp_path, "val_loss")) == 1
    model = sd.load(str(tmp_path / "run" / "model.safetensors"))
    task = make_task(world, frame_pool=64, validation=2)
    with torch.no_grad():
        latents = model.vae.encode(task.pool / 127.5 - 1)[0] * model.settings.latent_scale
    assert latents.std().item() == pytest.approx(1, rel=1e-3)
    assert (tmp_path / "run" / "sheet-00000040.png").exists()
