"""Pictures, clips and earlier videos that a user gives."""

import json
import os
import re
import signal
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from footage import number, picture, record, write_clip
from PIL import Image
from runs import ROOT, command

import sd
from clips.given import read_clip
from clips.write import read_metadata, write_video
from sample import Options

SETTINGS = sd.Settings(frames=4, width=32, height=32, fps=10)


def asked(**options):
    options = Options("x", **options)
    options.check_files()
    return options.read_files(SETTINGS)


@pytest.fixture
def clip(tmp_path):
    """A second of numbered frames, 20 of them, and no square."""
    path = tmp_path / "clip.mp4"
    write_clip(path, [30 * n for n in range(20)])
    return str(path)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "wide.png"
    Image.fromarray(picture(37, 960, 320)).save(path)
    return str(path)


def number_of(frame):
    """The number that a frame uint8 (H, W, 3) shows, where its width was not cropped."""
    return number(torch.tensor(frame).permute(2, 0, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Frames


@pytest.mark.parametrize("fps, expected", [(10.0, range(0, 20, 2)), (20.0, range(20)), (5.0, range(0, 20, 4)),
                                           (8.0, [0, 2, 5, 7, 10, 12, 15, 17])])
def test_a_clip_is_read_at_the_frame_rate(clip, fps, expected):
    frames, _ = read_clip("extend", clip, 96, 64, fps)
    assert [number_of(frame) for frame in frames] == list(expected)


def test_a_long_clip_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("clips.given.AT_ONCE", 7)
    write_clip(tmp_path / "long.mp4", [30 * n for n in range(60)])
    frames, _ = read_clip("extend", str(tmp_path / "long.mp4"), 96, 64, 20.0)
    assert [number_of(frame) for frame in frames] == [*range(60)]


def test_what_a_browser_recorded_is_read_too(tmp_path):
    path = tmp_path / "MediaRecorder.webm"
    record(path, [50 * n for n in range(20)], Fraction(1, 1000))
    assert [number_of(frame) for frame in read_clip("extend", str(path), 96, 64, 10.0)[0]] == list(range(0, 20, 2))


def test_frames_of_a_clip_are_kept_where_they_are(clip):
    found = asked(given=clip, keep=(3, 0), size=(96, 64))
    assert {n: number_of(frame) for n, frame in found["known"].items()} == {3: 6, 0: 0}
    assert found["frames"] == 4 and found["overlap"] is None


def test_a_clip_is_gone_on_with(clip):
    found = asked(extend=clip, size=(96, 64), overlap=2)
    assert [number_of(found["known"][n]) for n in range(10)] == list(range(0, 20, 2))
    assert found["frames"] == 10 + 2 and found["overlap"] == 2
    assert asked(extend=clip)["overlap"] == 3  # 4 unless that were all that the model makes


def test_pictures_are_fitted_as_in_training_and_it_is_told(image, capsys):
    found = asked(first=image, last=image, size=(96, 64))
    assert list(found["known"]) == [0, 3] and np.array_equal(found["known"][0], found["known"][3])
    told = f"{image}: 960x320, resized to 192x64, cropped to columns 48 to 143 of 0 to 191\n"
    assert capsys.readouterr().err == told * 2
    whole = np.asarray(Image.open(image).resize((192, 64), Image.BICUBIC))
    assert np.array_equal(found["known"][0], whole[:, 48:144])


def test_what_is_transparent_is_white(tmp_path):
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:16, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    frame = asked(first=str(tmp_path / "a.png"))["known"][0]
    assert not frame[:16].any() and (frame[16:] == 255).all()


def test_clips_and_pictures_go_together(clip, image):
    found = asked(first=image, given=clip, keep=(2,), frames=6)
    assert list(found["known"]) == [0, 2]
    assert list(asked(extend=clip, last=image, frames=16)["known"]) == [*range(10), 15]


@pytest.mark.parametrize("options, says", [
    ({"given": "CLIP"}, "given and keep go together"),
    ({"keep": (1,)}, "given and keep go together"),
    ({"given": "CLIP", "keep": (1, 1)}, "keep must name each frame once, got 1 twice"),
    ({"given": "CLIP", "keep": (1, 10)}, r"keep must name frames in 0..9, as many as .*clip.mp4 has at 10 FPS, got 10"),
    ({"given": "CLIP", "keep": (4,)}, "frames must be > 4, a frame that given gives, got 4"),
    ({"given": "CLIP", "keep": (0,), "first": "IMAGE"}, "given and first cannot both be given: each says what frame 0"),
    ({"extend": "CLIP", "first": "IMAGE"}, "first and extend cannot both be given"),
    ({"extend": "CLIP", "frames": 10}, "frames must be > 10, which .*clip.mp4 has at 10 FPS, got 10"),
    ({"extend": "CLIP", "fps": 30.0}, r"fps must be in 1..2\S+, the rate of .*clip.mp4, got 30"),
    ({"extend": "CLIP", "fps": 0.0}, r"fps must be in 1..2\S+, the rate of .*clip.mp4, got 0"),
    ({"first": "IMAGE", "last": "IMAGE", "frames": 1}, "last and first cannot both be given"),
    ({"first": "CLIP"}, "first: .*clip.mp4 cannot be used: not an image that can be read"),
    ({"extend": "IMAGE"}, "extend: .*wide.png cannot be used: "),
    ({"last": "nowhere.png"}, "last: nowhere.png cannot be used: missing"),
    ({"given": ROOT, "keep": (0,)}, "given: .* cannot be used: not a regular file"),
])
def test_what_cannot_be_given(clip, image, options, says):
    files = {"CLIP": clip, "IMAGE": image}
    with pytest.raises(ValueError, match=says):
        asked(**{name: files.get(value, value) if isinstance(value, str) else value
                 for name, value in options.items()})


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_frames_on_the_command_line(run, micro, image, tmp_path):
    done = run("sample.py", "x", "--ckpt", micro, "--first", image, "--last", image, "--steps=1", "--out",
               tmp_path / "a.gif")
    assert done.returncode == 0, done.stderr
    told = done.stderr.splitlines()
    assert told[0].endswith("wide.png: 960x320, resized to 96x32, cropped to columns 32 to 63 of 0 to 95")
    assert told[2] == ("warning: this model was never trained with given frames: they are put back at every step, "
                       "which guides the others less")


def test_a_clip_goes_on_in_windows(run, micro, clip, tmp_path):
    done = run("sample.py", "x", "--ckpt", micro, "--extend", clip, "--fps=8", "--frames", 20, "--overlap=2",
               "--steps=2", "--out", tmp_path / "a.mp4")
    assert done.returncode == 0, done.stderr
    assert "sample: 100%" in done.stderr and "12/12" in done.stderr  # 6 windows of 2 new frames
    with av.open(str(tmp_path / "a.mp4")) as file:
        assert sum(1 for _ in file.decode(video=0)) == 20


def test_the_settings_of_a_video_are_taken(run, micro, image, tmp_path):
    first = ["--ckpt", micro, "--first", image]
    done = run("sample.py", "--prompts_at", "0: a; 2: b", "--blend", *first, "--steps=2", "--guidance=3", "--seed=5",
               "--fps=4", "--negative=c", "--out", tmp_path / "one.gif")
    assert done.returncode == 0, done.stderr
    for kind in ("gif", "png", "mp4"):
        done = run("sample.py", "--like", tmp_path / "one.gif", *first, "--out", tmp_path / f"two.{kind}")
        assert done.returncode == 0, done.stderr
        told = [read_metadata(str(tmp_path / name)) for name in ("one.gif", f"two.{kind}")]
        assert told[0] == told[1] and told[0]["prompts_at"] == {"0": "a", "2": "b"} and told[0]["seed"] == 5
    assert (tmp_path / "one.gif").read_bytes() == (tmp_path / "two.gif").read_bytes()
    done = run("sample.py", "d", "--like", tmp_path / "two.png", *first, "--seed=6", "--out", tmp_path / "three.gif")
    assert done.returncode == 0, done.stderr
    changed = told[0] | {"prompt": "d", "prompts_at": {}, "seed": 6, "blend": False}
    assert read_metadata(str(tmp_path / "three.gif")) == changed


def test_the_shipped_model_needs_no_name(run, tmp_path):
    for more in (["x", "--steps=1", "--frames=1"], ["--like", tmp_path / "one.png"]):
        name = "two.png" if "--like" in more else "one.png"
        done = run("sample.py", *more, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize("made, says", [
    ("note.gif", "note.gif carries no settings: it must be a .mp4, .gif or .png that sample.py made"),
    ("plain.mp4", "plain.mp4 carries no settings"), ("list.png", "list.png carries no settings"),
    ("nowhere.mp4", "nowhere.mp4 cannot be used: missing"), ("pipe.gif", "pipe.gif cannot be used: not a regular file"),
    ("bomb.gif", "bomb.gif carries no settings"),
    ("other.png", "other.png was made with ckpt other.safetensors, a file that is not in it: give --ckpt too"),
    ("odd.png", "steps must be a whole number, got 'many'"), ("keys.png", "prompts_at must have a text for whole"),
])
def test_settings_that_cannot_be_taken(run, tmp_path, made, says):
    (tmp_path / "note.gif").write_text("a note")
    (tmp_path / "bomb.gif").write_bytes(b"GIF89a\xff\xff\xff\xff\x00\x00\x00")  # of 65,535 x 65,535 pixels
    os.mkfifo(tmp_path / "pipe.gif")
    write_clip(tmp_path / "plain.mp4", [0, 20, 40])
    for name, metadata in {"list.png": [1], "other.png": {"prompt": "x", "ckpt": "other.safetensors"},
                           "odd.png": {"prompt": "x", "steps": "many"}, "keys.png": {"prompts_at": {"x": 3}}}.items():
        write_video(str(tmp_path / name), np.zeros((1, 8, 8, 3), np.uint8), 8, metadata)
    done = run("sample.py", "--like", tmp_path / made, "--out", tmp_path / "new" / "a.png")
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("options, says", [
    (["--first", "README.md"], "first: README.md cannot be used: not an image that can be read"),
    (["--prompts_at", "8: a; 0: b"], "prompts_at must begin at frame 0 and rise, got 8, 0"),
    (["--prompts_at", "0: a; 8: b"], "prompt and prompts_at cannot both be given"),
    (["--prompts_at", "a"], "argument --prompts_at: must be FRAME: PROMPT"),
    (["--overlap", "4", "--frames", "9"], "overlap must be < 4"),
    (["--extend", "CLIP", "--frames", "12"], "frames must be > 20, which"),
    (["--given", "CLIP", "--keep", "0,99"], "keep must name frames in 0..19"),
])
def test_mistakes_are_one_line_and_nothing_is_written(run, micro, clip, tmp_path, options, says):
    options = [clip if word == "CLIP" else word for word in options]
    done = run("sample.py", "x", "--ckpt", micro, "--fps=20", *options, "--out", tmp_path / "new" / "a.mp4")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr
    assert not (tmp_path / "new").exists()


def test_ctrl_c_keeps_what_is_finished(processes, micro, tmp_path):
    path = tmp_path / "a.mp4"
    processes.start(["sample.py", "x", "--ckpt", micro, "--frames", 4000, "--overlap=2", "--steps=5", "--out", path],
                    target=command)
    (process,), progress = processes.all, processes.log
    while not (progress.exists() and re.search(r"\| ([3-9]\d|\d{3,})/", progress.read_text())) and process.is_alive():
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    assert processes.wait() == [130]
    said = progress.read_text()
    assert "Traceback" not in said and f"warning: stopped early: {path} has the first " in said
    with av.open(str(path)) as file:
        frames = sum(1 for _ in file.decode(video=0))
        assert json.loads(file.metadata["comment"])["frames"] == 4000
    assert frames >= 4 and f"has the first {frames} frames" in said
    assert os.listdir(tmp_path) and not list(tmp_path.glob("*.part"))
