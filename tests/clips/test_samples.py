"""Samples: which view of which images, and what is no sample."""

import json
from collections import Counter

import numpy as np
import pytest
from conftest import SPEC
from footage import PALETTE, Drawn, animation, write_clip
from PIL import Image

from clips.decode import Bad
from clips.samples import LiveClips, Spec, draw_view


def test_a_caption_that_mentions_a_side_is_never_mirrored():
    rng, spec = np.random.default_rng(0), Spec(4, 32, 32, flip=True)
    sided = ["a car turns left", "Right-hand drive", "rotating counter-clockwise", "a STOP sign", "a letter"]
    assert not any(draw_view(caption, spec, rng).mirror for caption in sided * 50)
    mirrored = np.mean([draw_view("a bright car", spec, rng).mirror for _ in range(400)])
    assert abs(mirrored - 0.5) < 0.1
    assert not any(draw_view("a car", Spec(4, 32, 32), rng).mirror for _ in range(50))


def test_a_random_crop_is_the_same_for_all_frames_of_a_clip(lists, tmp_path):
    """A crop that jumped would look like motion: in a clip of a still ramp nothing moves, between clips it does."""
    clips = LiveClips({"video": lists["video"]}, Spec(4, 16, 24, fps_values=(8,), starts=50, random_crop=True))
    samples = [clips.sample("video", 0, 0.0, k / 50).data for k in range(50)]
    assert all(sample.shape == (4, 3, 24, 16) for sample in samples)
    assert len({sample.numpy().tobytes() for sample in samples}) > 40
    ramp = np.linspace(0, 255, 96, dtype=np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    write_clip(tmp_path / "still.mp4", range(0, 1200, 20), pixels=lambda n: ramp)
    (tmp_path / "still.txt").write_text("a ramp")
    places = {}
    for crop in (False, True):
        clips = LiveClips({"video": str(tmp_path)}, Spec(4, 32, 32, fps_values=(8,), starts=50, random_crop=crop))
        samples = [clips.sample("video", 0, 0.0, k / 50).data.float() for k in range(50)]
        assert all((sample - sample[:1]).abs().max() < 8 for sample in samples)
        places[crop] = [round(sample[:, :, :, 0].mean().item()) for sample in samples]
    assert max(places[False]) - min(places[False]) < 3 and max(places[True]) - min(places[True]) > 50


def test_label_images_differ_and_repeat_only_when_few(lists, tmp_path):
    folder = tmp_path / "labels" / "thing"
    folder.mkdir(parents=True)
    for n in range(3):
        Image.new("RGB", (32, 32), (40 * n, 0, 0)).save(folder / f"{n}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n")
    (folder / "notes.txt").write_text("no image")
    many = LiveClips({"label": lists["label"]}, SPEC).sample("label", 0, 0, 0)
    assert len({frame.numpy().tobytes() for frame in many.data}) == 4 and many.fps == 0
    few = LiveClips({"label": str(tmp_path / "labels")}, SPEC).sample("label", 0, 0, 0)
    assert sorted(Counter(int(frame[0, 0, 0]) for frame in few.data).values()) == [1, 1, 2]
    assert few.skipped == ((str(folder / "broken.png"), "not an image that can be read"),)


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_what_is_transparent_shows_the_background_in_clips_and_images(tmp_path, kind):
    """Never the colors under alpha 0, which here are green."""
    rgba = np.full((32, 32, 4), (0, 255, 0, 0), np.uint8)
    rgba[:16] = PALETTE[5].tolist() + [255]
    (tmp_path / f"half_clear.{kind}").write_bytes(animation(kind, 32, 32, [Drawn(rgba, after="clear")] * 8))
    for background, color in (("white", (255, 255, 255)), ("#102030", (16, 32, 48))):
        spec = Spec(4, 32, 32, fps_values=(8,), background=background, captions="from_names")
        for source, count in (("video", 4), ("caption", 1)):
            sample = LiveClips({source: str(tmp_path)}, spec).sample(source, 0, 0.5, 0.5)
            assert sample.caption == "half clear" and len(sample.data) == count
            for rows, expected in ((sample.data[..., :16, :], PALETTE[5]), (sample.data[..., 16:, :], color)):
                assert np.abs(rows.numpy() - np.array(expected, int)[:, None, None]).max() <= 2
    with pytest.raises(ValueError, match="background must be a color, like white or #ffcc00, got 'whit'"):
        Spec(4, 32, 32, background="whit")


def test_names_that_no_file_can_have_are_missing(tmp_path):
    lines = [{"path": "x.mp4"}, {"path": "a\0b.mp4"}, {"path": "\ud800.mp4"}, {"videoid": 7, "page_dir": 3},
             {"videoid": "a", "page_dir": "\0"}]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(line | {"caption": "x"}) + "\n" for line in lines))
    for source in ("video", "caption"):
        clips = LiveClips({source: str(tmp_path / "l.jsonl")}, SPEC)
        for i in range(len(lines)):
            with pytest.raises(Bad, match="missing"):
                clips.sample(source, i, 0, 0)
