"""What the VAE loses, against scikit-image."""

import numpy as np
import pytest
from skimage.metrics import structural_similarity
from test_fvd import write_clips

import sd
from lab.evals import vae
from sample import SHIPPED


def test_vae_scores_are_scikit_images():
    """Inside and border by hand, from the reconstructions."""
    model = sd.load(SHIPPED)
    frames = next(iter(vae.toy_clips(4)))
    scores = vae.vae_scores(model, [frames])
    true = frames.numpy() / 255
    for how, back in zip(scores, vae.reconstructions(model, frames)):
        back = back.numpy()
        inside = np.mean([structural_similarity(a, b, data_range=1.0, channel_axis=0, full=True)[1][:, 8:-8, 8:-8]
                          for a, b in zip(true, back.astype(float))])
        error = np.mean((true - back)[..., 8:-8, 8:-8] ** 2)
        assert scores[how]["SSIM inside"] == pytest.approx(inside, abs=1e-4)
        assert scores[how]["PSNR inside"] == pytest.approx(-10 * np.log10(error), abs=1e-3)
        rim = ((true - back) ** 2).sum() - ((true - back)[..., 8:-8, 8:-8] ** 2).sum()
        assert scores[how]["PSNR border"] == pytest.approx(-10 * np.log10(rim / (4 * 3 * (64**2 - 48**2))), abs=0.01)


def test_the_command(run, micro, tmp_path):
    write_clips(tmp_path / "clips", np.random.default_rng(0), count=2)
    (tmp_path / "clips" / "001.mp4").write_bytes(b"no video")
    done = run("lab.evals.vae", "--ckpt", micro, "--clips", 1)
    assert done.returncode == 0 and "one by one" in done.stdout and "stitched" in done.stdout, done.stderr
    done = run("lab.evals.vae", "--ckpt", micro, "--video", tmp_path / "clips", "--size", "48x32", "--frames", 9)
    assert done.returncode == 0 and "1 clips of 9 frames" in done.stdout and "skipped " in done.stderr


@pytest.mark.parametrize("options, says", [
    (["--frames", 7], "got 7, which is prime: use 6 or 8"),
    (["--size", "36x32"], "width must be divisible by 8"),
    (["--video", "nowhere"], "nowhere: No such file"),
    (["--ckpt", "nowhere.safetensors"], "nowhere.safetensors"),
    (["--clips", 0], "clips must be >= 1, got 0"),
])
def test_mistakes_are_told_in_one_line(run, micro, options, says):
    done = run("lab.evals.vae", "--ckpt", micro, *options)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
