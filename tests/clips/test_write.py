"""Videos, animations and contact sheets that are written."""

import json
import os
import signal

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clips.decode import frames_at, opened
from clips.pictures import View, fit_frame
from clips.write import Kept, claim_paths, contact_sheet, playback_fps, read_metadata, write_video


@pytest.mark.parametrize("fps", [0.5, 4, 8, 29.97, 60, 120])
def test_mp4_decodes_with_its_rate_and_metadata(tmp_path, fps):
    video = np.zeros((6, 33, 47, 3), np.uint8)  # odd sides
    video[:, :, :, 0] = np.arange(6)[:, None, None] * 40
    path = tmp_path / "v.mp4"
    write_video(str(path), video, fps, {"prompt": "ein roter Kreis – ⚪", "seed": 3})
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert abs(float(stream.average_rate) - fps) < 0.01
        assert json.loads(file.metadata["comment"]) == {"prompt": "ein roter Kreis – ⚪", "seed": 3}
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(stream)])
    assert decoded.shape == (6, 34, 48, 3)
    assert np.abs(decoded[:, :33, :47].astype(int) - video).mean() < 4


def test_gif_and_png(tmp_path):
    video = np.random.default_rng(0).integers(0, 255, (6, 16, 24, 3), dtype=np.uint8)
    video[:] = video[:, :1, :1]
    write_video(str(tmp_path / "v.gif"), video, 10, {"seed": 1})
    with Image.open(tmp_path / "v.gif") as gif:
        assert gif.n_frames == 6 and gif.info["duration"] == 100 and json.loads(gif.info["comment"]) == {"seed": 1}
        for t in range(6):
            gif.seek(t)
            assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - video[t]).max() <= 3
    for fps, hundredths in ((30, [3, 4, 3, 3, 4, 3]), (60, [2] * 6), (8, [12, 13, 13, 12, 12, 13])):
        write_video(str(tmp_path / "t.gif"), video, fps, {})
        with Image.open(tmp_path / "t.gif") as gif:
            assert [gif.info["duration"] for t in range(6) if gif.seek(t) is None] == [10 * n for n in hundredths]
    write_video(str(tmp_path / "v.png"), video, 10, {"seed": 1})
    with Image.open(tmp_path / "v.png") as png:
        assert json.loads(png.text["comment"]) == {"seed": 1}
        assert (np.asarray(png) == contact_sheet(video)).all()


def test_settings_are_read_from_json_too(tmp_path):
    path = tmp_path / "v.json"
    path.write_text('{"prompt": "ein Kreis \u26aa", "seed": 3}', encoding="utf-8")
    assert read_metadata(str(path)) == {"prompt": "ein Kreis \u26aa", "seed": 3}
    for damaged in (b"[1]", b"\xff\xfe", b"{", b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="carries no settings|cannot be used"):
            read_metadata(str(path))


def test_contact_sheet_reads_left_to_right():
    sheet = contact_sheet(np.arange(6)[:, None, None, None] * np.ones((6, 5, 7, 3), np.uint8), gap=0)
    assert sheet[::5, ::7, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_playback():
    assert [playback_fps(f) for f in (0, 1, 8, 29.97, 60, 120)] == [8, 1, 8, 29.97, 60, 8]


@pytest.mark.parametrize("height, width", [(64, 64), (720, 1280)])
@pytest.mark.parametrize("color", [(200, 30, 30), (30, 200, 30), (30, 30, 200), (255, 255, 255), (90, 160, 220)])
def test_colors_play_as_they_are_at_every_size(tmp_path, height, width, color):
    """By BT.709, which the file says: by its formula from the planes, by libav and by our own reader."""
    path = str(tmp_path / "flat.mp4")
    write_video(path, np.full((2, height, width, 3), color, np.uint8), 8, {})
    with av.open(path) as file:
        context = file.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        frame = next(file.decode(video=0))
        planes = frame.to_ndarray()  # Y, then U and V of a quarter of its size
        seen = frame.to_ndarray(format="rgb24")[height // 2, width // 2]
    y, u, v = planes[height // 2, 0], planes[height + 4].min(), planes[-4].max()
    y, u, v = (float(y) - 16) / 219, (float(u) - 128) / 224, (float(v) - 128) / 224
    formula = 255 * np.array([y + 1.5748 * v, y - 0.1873 * u - 0.4681 * v, y + 1.8556 * u])
    with opened(path) as video:
        ours = fit_frame(frames_at(video, [0.1])[0], video.aspect, 64, 64, View())[:, 32, 32].numpy()
    for read, levels in ((formula, 2), (seen, 3), (ours, 4)):  # libav rounds downwards, and more so when it resizes
        assert np.abs(read - np.array(color, float)).max() <= levels
    assert b"colr" in (tmp_path / "flat.mp4").read_bytes()  # for players that read the container alone


@pytest.mark.parametrize("ending", ["mp4", "gif", "png"])
def test_any_prompt_can_be_told(tmp_path, ending):
    """Bytes of a command line that are no text come as surrogates, which no UTF-8 can hold."""
    told = {"prompt": os.fsdecode(b"a caf\xe9 \0 \"quoted\"\n") + "日本 😀 " + "long " * 500}
    path = str(tmp_path / f"v.{ending}")
    write_video(path, np.zeros((2, 16, 16, 3), np.uint8), 8, told)
    if ending == "mp4":
        with av.open(path) as file:
            comment = file.metadata["comment"]
    else:
        with Image.open(path) as image:
            comment = image.info["comment"]
    assert json.loads(comment) == told


@pytest.mark.parametrize("ending", ["mp4", "gif", "png"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, ending):
    video, old = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), np.uint8), tmp_path / f"v.{ending}"
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old.write_text("as it was")
    for size in (0, 1000, 5000):
        with claim_paths(str(tmp_path / "new" / f"v.{ending}"), [("", 0)], False) as (path,):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            try:
                for target in (path, str(old)):
                    with pytest.raises(OSError, match="cannot be written: File too large"):
                        write_video(target, video, 8, {})
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == [old.name] and old.read_text() == "as it was"


# ---------------------------------------------------------------------------------------------------------------------
# Names


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=300) | st.text("日本語の𠀀é😀", min_size=50, max_size=300)
                | st.sampled_from(["con", "NUL", "a.", "b ", "..", "/etc/passwd", "A cat", "a cat", "\udcff"]),
                min_size=1, max_size=6))
def test_names_of_any_prompts_can_be_held(tmp_path_factory, prompts):
    """In the folder, each its own even where case does not count, and short enough for encrypted file systems (143)."""
    folder = tmp_path_factory.mktemp("names")
    with claim_paths(str(folder), [(prompt, -(2**63)) for prompt in prompts], False) as paths:
        assert len({path.lower() for path in paths}) == len(prompts)
        for path in paths:
            name = os.path.basename(path)
            assert os.path.dirname(path) == str(folder) and len(os.fsencode(name + ".part.try")) <= 143
            assert name[0] not in ".- " and not set(name) & set('<>:"/\\|?*\0')
            assert name.split(".")[0].upper() not in ("CON", "NUL", "AUX", "PRN")
            with open(path, "w"):
                pass
    assert sorted(os.listdir(folder)) == sorted(map(os.path.basename, paths))


def test_a_folder_may_have_a_dot_in_its_name(tmp_path):
    (tmp_path / "v1.5").mkdir()
    (tmp_path / "a.mp4").mkdir()
    for out in ("v1.5", "v1.5/", "new.v2/", "a.mp4", "plain"):
        with claim_paths(f"{tmp_path}/{out}", [("a cat", 3)], True) as paths:
            assert paths == [f"{tmp_path}/{out.rstrip('/')}/a-cat-seed3.png"]
    for out in ("clip.webp", "v1.6"):
        with pytest.raises(ValueError, match=r"end in \.mp4, \.gif, \.png, \.html, got .* a new folder with a dot"):
            claim_paths(str(tmp_path / out), [("a cat", 3)], True).__enter__()


def test_files_that_are_there_stay(tmp_path):
    (tmp_path / "a.mp4").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        claim_paths(str(tmp_path / "a.mp4"), [("a cat", 3)], False).__enter__()
    assert os.listdir(tmp_path) == ["a.mp4"]
    (tmp_path / "b.mp4.part").touch()  # as a killed process leaves it
    with pytest.raises(ValueError, match=r"b.mp4.part is there already: choose another out, or remove it"):
        claim_paths(str(tmp_path / "b.mp4"), [("a cat", 3)], False).__enter__()


def test_folders_are_left_behind_only_with_something_in_them(tmp_path):
    (tmp_path / "mine").mkdir()
    for out in ("new/newer/a.mp4", "new/newer/", "mine/new", "mine", "mine/" + "deep/" * 2500):
        with pytest.raises(OSError), claim_paths(f"{tmp_path}/{out}", [("a cat", 3)], False):
            raise OSError("what was to come did not")
        assert os.listdir(tmp_path) == ["mine"] and os.listdir(tmp_path / "mine") == []
    with claim_paths(f"{tmp_path}/new/newer", [("a cat", 3)], False) as (path,):
        open(path, "w").close()
    assert os.listdir(tmp_path / "new" / "newer") == ["a-cat-seed3.mp4"]


@pytest.mark.parametrize("while_written", (True, False))
def test_ctrl_c_keeps_the_frames_that_are_finished(tmp_path, while_written):
    """Be it while a frame is made, or while one is written."""
    def parts():
        for n in range(9):
            if n == 3 and not while_written:
                os.kill(os.getpid(), signal.SIGINT)
            yield np.full((1, 2, 16, 16, 3), n, np.uint8)

    def written(frames):
        for n, frame in enumerate(frames):
            yield frame
            if n == 5 and while_written:
                os.kill(os.getpid(), signal.SIGINT)

    before, kept = signal.getsignal(signal.SIGINT), Kept(parts())
    write_video(str(tmp_path / "a.mp4"), written(kept), 8, {})
    with av.open(str(tmp_path / "a.mp4")) as file:
        assert sum(1 for _ in file.decode(video=0)) == kept.count == 6
    with pytest.raises(KeyboardInterrupt):
        kept.tell("a.mp4")
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_the_first_frame_leaves_no_file(tmp_path):
    def parts():
        os.kill(os.getpid(), signal.SIGINT)
        yield np.zeros((1, 2, 16, 16, 3), np.uint8)

    with pytest.raises(KeyboardInterrupt):
        write_video(str(tmp_path / "a.mp4"), Kept(parts()), 8, {})
    assert os.listdir(tmp_path) == []
