"""weights/tiny.safetensors and the first command of the README."""

import json
import os

import av
from conftest import ROOT, script

from lab import toy
from sample import SHIPPED, Request, generate
from sd import load

RUNS = {"tiny_vae", "tiny_vae_finish", "tiny_first", "tiny_frames", "tiny_all", "tiny_finish", "tiny_green",
        "tiny_last", "tiny_polish"}


def test_the_file_is_small_and_says_where_it_comes_from():
    assert os.path.getsize(SHIPPED) < 48e6
    settings = load(SHIPPED).settings
    assert (settings.frames, settings.width, settings.height) == (16, 64, 64) and settings.grid_trained
    for part in ("vae", "unet"):  # through every run that it comes from, the last first
        origin = settings.origin[part]
        while origin:
            assert 0 < origin["steps"] <= origin["config"]["max_steps"] and len(origin["commit"]) == 40
            assert os.path.basename(origin["config"]["out_dir"]) in RUNS | {"tiny"}  # as tiny_first was called then
            origin = origin.get("from")


def test_training_metrics_lie_beside_it():
    with open(os.path.join(ROOT, "weights", "tiny.metrics.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    assert {line["run"] for line in lines} == RUNS


def test_the_first_command_writes_a_video(tmp_path):
    """With no network: a 16-frame 64x64 mp4, named after its prompt."""
    done = script("sample.py", "a red circle moving right", "--out", tmp_path / "clip.mp4",
                  env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height, stream.pix_fmt) == ("h264", 64, 64, "yuv420p")
        assert len(list(file.decode(stream))) == 16


def test_shipped_weights_draw_what_is_asked_for():
    """One video of each direction, of held-out triples: the motion and the background must be those of the prompt."""
    chosen = {direction: (color, shape, direction) for color, shape, direction in toy.triples("test")}
    prompts = [toy.caption(*triple, background) for triple, background in zip(chosen.values(), toy.BACKGROUNDS)]
    videos = generate(load(SHIPPED), Request(tuple(prompts), steps=25))
    seen = [toy.grade(video) for video in videos]
    assert len(seen) == 4
    assert sum(grade.direction == direction for grade, direction in zip(seen, chosen)) >= 3
    assert [grade.background for grade in seen] == list(toy.BACKGROUNDS)[:4]
