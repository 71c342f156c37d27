"""The CLIP score against open_clip called by hand."""

import numpy as np
import open_clip
import pytest
import torch
from test_fvd import write_clips

from clips.filter import spaced_frames

CLIP = "ViT-S-32-alt"  # one of open_clip's smallest


def test_clip_score_is_open_clips(run, tmp_path):
    """By hand: 100 x the cosine of normed features, mean over frames, then over videos. Random weights, from a file."""
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(CLIP)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    write_clips(tmp_path / "clips", np.random.default_rng(0), count=2)
    prompts = ["a red circle", "snow on a mountain"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    done = run("lab.evals.clip", tmp_path / "clips", "--prompts", tmp_path / "prompts.txt", "--model", CLIP,
               "--pretrained", tmp_path / "clip.pt", "--frames", 4)
    assert done.returncode == 0, done.stderr
    model.eval()
    expected = []
    for n, prompt in enumerate(prompts):
        frames = spaced_frames(str(tmp_path / "clips" / f"{n:03d}.mp4"), 4)
        with torch.no_grad():
            text = model.encode_text(open_clip.get_tokenizer(CLIP)([prompt]))[0]
            images = [model.encode_image(preprocess(frame)[None])[0] for frame in frames]
        expected.append(np.mean([100 * torch.cosine_similarity(image, text, dim=0).item() for image in images]))
    assert float(done.stdout.split()[2]) == pytest.approx(np.mean(expected), abs=0.006)


@pytest.mark.parametrize("options, says", [
    (["{}/nowhere"], "nowhere cannot be read"),
    (["{}/clips", "--prompts", "{}/none.txt"], "which is not there; a prompt itself stands"),
    (["{}/clips", "--prompts", "{}/one.txt"], "a prompt for each of the 2 videos"),
    (["{}/clips", "--prompts", "{}/clips/000.mp4"], "not text in UTF-8"),
    (["{}/clips", "--frames", "0"], "frames must be >= 1, got 0"),
])
def test_mistakes_are_told_in_one_line(run, tmp_path, options, says):
    write_clips(tmp_path / "clips", np.random.default_rng(0), count=2)
    (tmp_path / "one.txt").write_text("one")
    done = run("lab.evals.clip", *[option.format(tmp_path) for option in options])
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
