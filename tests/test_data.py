"""data.py: lists, clips by presentation time, encoding ahead, and the order in which samples are met."""

import json
import os
from collections import Counter
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from checkpoint import UserError, load
from data import EncodedClips, Stream, encode, fit, read_clip, read_list, usable_fps


@pytest.fixture(scope="module")
def lists(world):
    files = {"video": "videos.csv", "label": "labels", "caption": "images.jsonl"}
    return {source: os.path.join(world, name) for source, name in files.items()}


@pytest.fixture(scope="module")
def encoded(lists, micro, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("encoded") / "clips")
    encode(load(micro), lists, out, frames=4, size=(32, 32), fps_values=(4, 8), starts=2, draws=3, seed=5)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Lists


def test_lists_of_the_toy_world(lists):
    for source, n, each in (("video", 8, 1), ("label", 72, 4), ("caption", 8, 1)):
        items = read_list(source, lists[source])
        assert len(items) == n
        assert all(len(files) == each and all(map(os.path.isfile, files)) for _, files in items)
    assert all(" moving " in caption for caption, _ in read_list("video", lists["video"]))


@pytest.mark.parametrize("source, content", [("video", "a,b\n1,2\n"), ("caption", "{not json"), ("caption", ""),
                                             ("caption", '{"path": "x.png"}\n')])
def test_bad_lists_are_named(tmp_path, source, content):
    path = tmp_path / "list"
    path.write_text(content)
    with pytest.raises(UserError, match=f"{source} list {path}"):
        read_list(source, str(path))
    with pytest.raises(UserError, match="cannot be read"):
        read_list(source, str(tmp_path / "nowhere"))


# ---------------------------------------------------------------------------------------------------------------------
# Clips


def numbered_clip(path, times, time_base=Fraction(1, 600)):
    """A clip whose frame n is of gray level 8 + 8 n, shown from times[n] (in units of time_base)."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30, options={"crf": "5", "bf": "2", "g": "12"})
        stream.width = stream.height = 32
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", time_base
        for n, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 8 + 8 * n, np.uint8))
            frame.pts, frame.time_base = time, time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


class At:
    """A stand-in for a random generator, to choose the start of a clip."""

    def __init__(self, start):
        self.start = start

    def uniform(self, low, high):
        return min(self.start, high)


@pytest.mark.parametrize("rate", ["constant", "variable"])
@pytest.mark.parametrize("fps, start", [(30, 0.0), (15, 0.21), (8, 0.11), (4, 0.05)])
def test_frames_are_those_on_screen(tmp_path, rate, fps, start):
    """Frame k is the one whose presentation interval contains start + k / fps, as a loop over the times says."""
    gaps = [20] * 29 if rate == "constant" else [10 + (7 * n) % 31 for n in range(29)]
    times = np.cumsum([0, *gaps]).tolist()
    numbered_clip(tmp_path / "clip.mp4", times)
    T = 3
    video = read_clip(str(tmp_path / "clip.mp4"), fps, T, At(start))
    seen = [round((frame.mean() - 8) / 8) for frame in video.astype(float)]
    assert seen == [max(n for n, time in enumerate(times) if time / 600 <= start + k / fps + 1e-9) for k in range(T)]


def test_usable_fps():
    """f <= 1.01 x the rate, and (T - 1) / f < the duration."""
    assert usable_fps(29.97, 20, 16) == [1, 2, 4, 8, 15, 30]
    assert usable_fps(60, 5, 16) == [4, 8, 15, 30, 60]
    assert usable_fps(29.0, 0.4, 16) == []
    assert usable_fps(30, 15, 16) == [2, 4, 8, 15, 30]  # 15 s are just too short for 1 FPS


@settings(max_examples=30, deadline=None)
@given(st.integers(9, 80), st.integers(9, 80), st.integers(1, 5), st.integers(1, 5))
def test_fit_gives_the_size_asked_for(height, width, w, h):
    out = fit(np.zeros((2, height, width, 3), np.uint8), 8 * w, 8 * h)
    assert out.shape == (2, 3, 8 * h, 8 * w) and out.dtype == torch.uint8


def test_fit_crops_the_middle():
    image = np.zeros((1, 20, 40, 3), np.uint8)
    image[:, :, 10:30] = 200  # the middle square
    assert (fit(image, 10, 10) > 150).float().mean() > 0.95


# ---------------------------------------------------------------------------------------------------------------------
# Encoding ahead


def test_encoded_samples_are_the_vae_of_the_clips(encoded, lists, micro):
    """Decode and encode one sample of each source by hand, from its line in the index."""
    clips, vae = EncodedClips(encoded), load(micro).vae
    counts = Counter(line["source"] for line in clips.index)
    assert counts == {"video": 8 * 2 * 2, "label": 72 * 3, "caption": 8}
    for source in data.SOURCES:
        line = clips.index[clips.rows[source][-1]]
        files = read_list(source, lists[source])[line["item"]][1]
        rng = data.sample_rng(line["seed"], source, line["item"], line["fps"], line["k"])
        frames = data.read_sample(source, files, line["fps"], 4, (32, 32), rng)
        mean, logvar = vae.encode(frames / 127.5 - 1)
        expected = torch.cat([mean, logvar], dim=1).half().float()
        got = clips.moments(clips.rows[source][-1]).float()
        assert got.shape == (1 if source == "caption" else 4, 8, 4, 4)
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)


def test_encode_refuses_to_overwrite(encoded, lists, micro):
    with pytest.raises(UserError, match="is there already"):
        encode(load(micro), lists, encoded, frames=4, size=(32, 32))


def test_encode_command(run, lists, micro, tmp_path):
    done = run("data.py", "encode", tmp_path / "o", "--ckpt", micro, "--caption", lists["caption"], "--size", "32x32",
               "--frames", 4)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "o" / "index.jsonl").read_text().splitlines()) == 8
    done = run("data.py", "encode", tmp_path / "p", "--ckpt", micro, "--video", "nowhere.csv")
    assert done.returncode == 2 and "nowhere.csv" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "p").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The order of samples


def stream(encoded, **options):
    options = {"mix": {"video": 2, "label": 1, "caption": 1}, "batch_size": 4, "frames": 4, "latent_scale": 0.5,
               "seed": 3} | options
    return Stream(EncodedClips(encoded), **options)


def test_batches_have_the_mix_and_the_condition(encoded):
    batch = stream(encoded, drop_caption=0.0).batch(0)
    assert batch.latents.shape == (4, 4, 4, 4, 4)
    assert batch.sources == ["video", "video", "label", "caption"]
    assert batch.fps[2:].tolist() == [0, 120] and all(f in (4, 8) for f in batch.fps[:2].tolist())
    assert (batch.latents[3] == batch.latents[3, :1]).all()  # one image, repeated
    assert (batch.latents[2, 0] != batch.latents[2, 1]).any()
    assert all(batch.captions)


def test_an_epoch_meets_every_sample_once(encoded):
    s = stream(encoded)
    videos = len(s.clips.rows["video"])
    met = [s.sample_at(4 * turn + slot) for turn in range(videos // 2) for slot in (0, 1)]
    assert sorted(met) == s.clips.rows["video"]
    again = [s.sample_at(4 * turn + slot) for turn in range(videos // 2, videos) for slot in (0, 1)]
    assert sorted(again) == s.clips.rows["video"] and again != met


def test_ranks_share_the_stream(encoded):
    """Two ranks with batches of 4 meet together what one rank with a batch of 8 meets."""
    whole = stream(encoded, batch_size=8, drop_caption=0.0).batch(5)
    parts = [stream(encoded, rank=r, world=2, drop_caption=0.0).batch(5) for r in (0, 1)]
    assert parts[0].captions + parts[1].captions == whole.captions
    assert torch.cat([parts[0].fps, parts[1].fps]).tolist() == whole.fps.tolist()


def test_a_batch_is_a_function_of_its_number(encoded):
    s = stream(encoded)
    late = s.batch(100)
    for _ in range(3):
        s.batch(7)
    fresh = stream(encoded).batch(100)
    assert torch.equal(late.latents, fresh.latents) and late.captions == fresh.captions
    assert not torch.equal(late.latents, stream(encoded, seed=4).batch(100).latents)


def test_captions_are_dropped_at_the_stated_rate(encoded):
    s = stream(encoded, drop_caption=0.3)
    dropped = np.mean([caption == "" for n in range(150) for caption in s.batch(n).captions])
    assert abs(dropped - 0.3) < 0.06


def test_latents_are_scaled_posterior_samples(encoded):
    """Over many draws of one sample: mean x scale, and spread x scale."""
    s = stream(encoded)
    moments = torch.zeros(1, 8, 4, 4)
    moments[:, :4], moments[:, 4:] = 3.0, 2 * np.log(0.2)
    draws = torch.stack([s.draw(moments, data.generator(i))[0] for i in range(400)])
    assert abs(draws.mean() - 1.5) < 0.01 and abs(draws.std() - 0.1) < 0.01


def test_a_mix_without_samples_is_refused(encoded, tmp_path):
    with open(os.path.join(encoded, "index.jsonl")) as file:
        lines = [line for line in file if json.loads(line)["source"] != "label"]
    os.symlink(os.path.join(encoded, "00000.safetensors"), tmp_path / "00000.safetensors")
    for name in os.listdir(encoded):
        if name != "index.jsonl" and not (tmp_path / name).exists():
            os.symlink(os.path.join(encoded, name), tmp_path / name)
    (tmp_path / "index.jsonl").write_text("".join(lines))
    with pytest.raises(UserError, match="label"):
        stream(str(tmp_path))
    with pytest.raises(UserError, match="not a folder of encoded clips"):
        EncodedClips(str(tmp_path / "nowhere"))
