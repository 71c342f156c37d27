"""training/vae.py: the autoencoder's loss, its frames, and a run."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from footage import write_clip
from runs import ROOT, ci_options, metrics, train_here

import sd
from clips.samples import Spec
from training.config import read_config
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
        task.begin(3, 9)
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
    with pytest.raises(ValueError, match="no frame of .*videos.jsonl can be used"):
        frame_pool({"video": str(tmp_path / "videos.jsonl")}, 8, SPEC)


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
