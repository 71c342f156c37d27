"""toy.py: the world's rules, its files as other programs read them, and the grader on what is right and what is not."""

import csv
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import combinations, product
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import toy

ALL = list(product(toy.COLORS, toy.SHAPES, toy.DIRECTIONS))
SMALL = {"clips": 3, "images": 1, "captioned": 5}
seeds = st.integers(0, 2**32)
quick = settings(max_examples=60, deadline=None)


def read(path):
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def blurred(video, sigma):
    kernel = np.exp(-(np.arange(-3, 4) ** 2) / 2 / sigma**2)
    kernel /= kernel.sum()
    for axis in (1, 2):
        pad = [(3, 3) if a == axis else (0, 0) for a in range(4)]
        padded = np.pad(video.astype(float), pad, mode="edge")
        video = sum(k * padded.take(range(i, i + video.shape[axis]), axis) for i, k in enumerate(kernel))
    return video


def clip(color="red", shape="circle", direction="right", background="black", fps=8, seed=0, frames=16, size=64):
    """frames sampled at fps from a random start of a true clip, before any compression."""
    rng = np.random.default_rng(seed)
    times = rng.uniform(0, toy.SECONDS - 1 / 60 - (frames - 1) / fps) + np.arange(frames) / fps
    return toy.draw(color, shape, background, toy.trajectory(direction, times, rng, size), size)


def painted(inside, color=(255, 60, 50), background=(0, 0, 0)):
    """16 frames of the region where inside(y, x), px from its middle, which moves down half a pixel a frame."""
    y, x = np.meshgrid(*[np.arange(0.125, 64, 0.25) - 32] * 2, indexing="ij")
    cover = np.stack([inside(y - (t - 8) / 2, x).reshape(64, 4, 64, 4).mean((1, 3)) for t in range(16)])[..., None]
    return (cover * color + (1 - cover) * background).round().astype(np.uint8)


def roll_grid(video, dy, dx, rows=4, cols=4):
    """The video after its grid image was shifted, so that every cell shows parts of two."""
    frames, height, width, _ = video.shape
    image = video.reshape(cols, rows, height, width, 3).transpose(1, 2, 0, 3, 4).reshape(rows * height, cols * width, 3)
    image = np.roll(image, (dy, dx), (0, 1)).reshape(rows, height, cols, width, 3)
    return image.transpose(2, 0, 1, 3, 4).reshape(frames, height, width, 3)


def answers(grade):
    return grade.color, grade.shape, grade.direction, grade.background, grade.wrong_cut


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "world"
    seen = []
    toy.render(folder, seed=3, **SMALL, progress=lambda done, total: seen.append((done, total)), workers=2)
    assert seen == [(i + 1, 80) for i in range(80)]  # 3 + 72 + 5
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Words


def test_splits_are_disjoint_complete_and_even():
    train, val, test = (toy.triples(split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (54, 6, 12)
    assert sorted(train + val + test) == sorted(ALL)
    counts = lambda split, part: sorted(Counter(triple[part] for triple in split).values())  # noqa: E731
    assert [counts(test, part) for part in range(3)] == [[2] * 6, [4] * 3, [3] * 4]
    assert [counts(val, part) for part in range(3)] == [[1] * 6, [2] * 3, [1, 1, 2, 2]]
    assert set(Counter(triple[:2] for triple in train).values()) == {3}  # each pair moves three ways in training
    assert len({(color, direction) for color, _, direction in train}) == 24  # and each colour in all four
    assert len({(shape, direction) for _, shape, direction in train}) == 12


def test_splits_are_what_they_were():
    """Published numbers are of these triples: they must never change."""
    assert toy.triples("val") == [("red", "square", "right"), ("green", "triangle", "down"), ("blue", "circle", "up"),
                                  ("yellow", "square", "left"), ("white", "triangle", "up"),
                                  ("purple", "circle", "right")]
    text = repr(toy.triples("test")).encode()
    assert hashlib.sha256(text).hexdigest().startswith("d1dbd1890465687f")
    with pytest.raises(toy.ToyError, match="no split 'tset'"):
        toy.triples("tset")


def test_captions():
    assert toy.caption("red", "circle", "right", "black") == "a red circle moving right on a black background"
    assert toy.caption("red", "circle", None, "black") == "a red circle on a black background"
    assert toy.caption("red", "circle", "right") == "a red circle moving right"
    for what in product(toy.COLORS, toy.SHAPES, [None, *toy.DIRECTIONS], [None, *toy.BACKGROUNDS]):
        assert toy.expected(toy.caption(*what)) == what
    assert toy.expected("The BLUE triangle, moving up!") == ("blue", "triangle", "up", None)
    assert toy.expected("a reddish dog") == (None, None, None, None)


def test_colours_are_well_apart():
    palette = {**toy.COLORS, **toy.BACKGROUNDS}
    for one, two in combinations(palette.values(), 2):
        assert np.linalg.norm(np.subtract(one, two)) >= 120
    luma = lambda rgb: np.dot(rgb, (0.299, 0.587, 0.114))  # noqa: E731
    for one, two in product(toy.COLORS.values(), toy.BACKGROUNDS.values()):
        assert abs(luma(one) - luma(two)) >= 30


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def test_areas_and_position_are_sub_pixel():
    centers = np.random.default_rng(0).uniform(20, 40, (50, 2))
    for shape, area in (("circle", np.pi / 4), ("square", 1), ("triangle", 1 / 2)):
        for size in (32, 64):
            scale = size / 64
            cover = toy.coverage(shape, centers * scale, size)
            assert cover.shape == (50, size, size) and 0 <= cover.min() < cover.max() <= 1
            np.testing.assert_allclose(cover.sum((1, 2)) / scale**2, area * toy.EXTENT**2, rtol=0.05)
            places = (np.arange(size) + 0.5) / scale
            middle = np.stack([(cover.sum(2) @ places), (cover.sum(1) @ places)], 1) / cover.sum((1, 2))[:, None]
            below = toy.EXTENT / 6 if shape == "triangle" else 0  # a triangle's centroid lies below its box's middle
            np.testing.assert_allclose(middle - centers, np.array([[below, 0]]).repeat(50, 0), atol=0.15)


def test_the_apex_is_up():
    rows = toy.coverage("triangle", [[32, 32]])[0].sum(1)
    assert np.all(np.diff(rows[27:37]) > 0.5)


@quick
@given(seeds, st.sampled_from([*ALL]), st.sampled_from([*toy.BACKGROUNDS]), st.sampled_from([32, 64]))
def test_nothing_leaves_the_frame(seed, triple, background, size):
    color, shape, direction = triple
    rng = np.random.default_rng(seed)
    times = np.append(np.linspace(0, 299 / 60, 12), toy.SECONDS)
    centers = toy.trajectory(direction, times, rng, size)
    frames = toy.draw(color, shape, background, centers, size)
    assert frames.dtype == np.uint8 and frames.shape == (13, size, size, 3)
    if size == 64:  # at 32 the margin is half a pixel
        edges = np.concatenate([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], 1)
        assert np.all(edges == toy.BACKGROUNDS[background])
    way = np.array(toy.DIRECTIONS[direction])
    np.testing.assert_allclose(np.diff(centers, axis=0), way * np.diff(times)[:, None] * 10 * size / 64, atol=1e-9)
    y, x = (centers[0] * 64 / size).round().astype(int)
    assert tuple(frames[0, y * size // 64, x * size // 64]) == toy.COLORS[color]


def test_positions_across_the_motion_and_of_stills_fill_the_frame():
    rng = np.random.default_rng(0)
    across = np.array([toy.trajectory("up", [0], rng)[0, 1] for _ in range(500)])
    stills = np.array([toy.trajectory(None, [0], rng)[0] for _ in range(500)])
    for places in (across, *stills.T):
        assert 6.75 <= places.min() < 8 and 56 < places.max() <= 57.25
        assert np.histogram(places, 5, (6.75, 57.25))[0].min() > 60


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_videos_are_webvid_and_true(world):
    with open(world / "videos.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["videoid", "contentUrl", "duration", "page_dir", "name"] and len(rows) == 3
    for row in rows:
        path = world / "videos" / row["page_dir"] / f"{row['videoid']}.mp4"
        assert row["duration"] == "PT00H00M05S" and row["contentUrl"] == path.relative_to(world).as_posix()
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 60)
            frames = list(file.decode(stream))
            assert [frame.time for frame in frames] == pytest.approx(np.arange(300) / 60)
            assert max(np.diff([i for i, frame in enumerate(frames) if frame.key_frame])) <= 30
        grade = toy.grade(read(path)[::12])
        color, shape, direction, background = toy.expected(row["name"])
        assert (color, shape, direction) in toy.triples("train")
        assert answers(grade) == (color, shape, direction, background or grade.background, False)
        assert grade.speed == pytest.approx(2, abs=0.02)


def test_images_and_labels_are_true(world):
    labels = sorted(os.listdir(world / "labels"))
    assert labels == sorted(toy.caption(c, s, None, b)
                            for c, s, b in product(toy.COLORS, toy.SHAPES, toy.BACKGROUNDS))
    stills = [(path, path.parent.name) for path in sorted((world / "labels").glob("*/*.png"))]
    assert [path.name for path, _ in stills] == ["000.png"] * 72
    lines = [json.loads(line) for line in (world / "images.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == [f"images/{i:05d}.png" for i in range(5)]
    stills += [(world / line["path"], line["caption"]) for line in lines]
    for path, text in stills:
        image = read(path)
        assert image.shape == (1, 64, 64, 3)
        color, shape, direction, background = toy.expected(text)
        grade = toy.grade(image)
        assert direction is None
        assert answers(grade) == (color, shape, None, background or grade.background, False), text
    assert json.loads((world / "world.json").read_text()) == {"seed": 3, "size": 64, "moving": False, **SMALL}


def test_png_is_lossless(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    toy.write_png(tmp_path / "a.png", image)
    np.testing.assert_array_equal(read(tmp_path / "a.png")[0], image)


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_the_same_seed_makes_the_same_files(world, tmp_path):
    toy.render(tmp_path / "again", seed=3, **SMALL, workers=5)
    assert files(tmp_path / "again") == files(world)
    toy.render(tmp_path / "other", seed=4, **SMALL, workers=2)
    one, other = files(world), files(tmp_path / "other")
    assert not [path for path in one if path.suffix in (".png", ".mp4") and one[path] == other[path]]
    assert len({one[path] for path in one if path.suffix == ".png"}) == 77  # no two images are the same either


def test_every_combination_is_drawn_and_a_quarter_is_short(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "write_mp4", lambda path, frames: None)
    monkeypatch.setattr(toy, "write_png", lambda path, image: None)
    monkeypatch.setattr(toy, "draw", lambda color, shape, background, centers, size: [(color, shape, background)])
    monkeypatch.setattr(toy, "write_mp4", lambda path, frames: seen.append(frames[0]))
    seen = []
    toy.render(tmp_path / "w", clips=432, images=0, captioned=720, workers=1)
    rows = list(csv.reader(open(tmp_path / "w" / "videos.csv")))[1:]
    drawn = Counter((*what, toy.expected(row[4])[2]) for what, row in zip(seen, rows, strict=True))
    assert drawn == {(c, s, b, d): 2 for c, s, d in toy.triples("train") for b in toy.BACKGROUNDS}
    texts = [json.loads(line)["caption"] for line in open(tmp_path / "w" / "images.jsonl")]
    for captions in ([row[4] for row in rows], texts):
        assert 0.19 < np.mean(["background" not in text for text in captions]) < 0.31


def test_half_of_the_stills_can_be_of_what_moves(tmp_path):
    toy.render(tmp_path / "w", clips=0, images=1, captioned=720, moving=True)
    lines = [json.loads(line) for line in open(tmp_path / "w" / "images.jsonl")]
    stills = [(tmp_path / "w" / line["path"], line["caption"]) for line in lines]
    labels = [(path, path.parent.name) for path in sorted((tmp_path / "w" / "labels").glob("*/*.png"))]
    assert len(labels) == len(set(label for _, label in labels)) == 144
    along = []
    for pairs in (stills, labels):
        asked = [(path, *toy.expected(text)) for path, text in pairs]
        moving = [(path, triple) for path, *triple, _ in asked if triple[2]]
        assert len(moving) == len(pairs) / 2 and {tuple(triple) for _, triple in moving} <= set(toy.triples("train"))
        for path, (color, shape, direction) in moving:
            grade = toy.grade(read(path))
            assert (grade.color, grade.shape) == (color, shape)
            along.append(grade.centers[0] @ np.abs(toy.DIRECTIONS[direction]))
    assert {tuple(toy.expected(text)[:3]) for _, text in stills if "moving" in text} == set(toy.triples("train"))
    assert np.histogram(along, 5, (6, 58))[0].min() > 50  # at any moment of the motion


def test_half_a_world_is_never_there(tmp_path, monkeypatch):
    def fail(path, frames):
        raise OSError("disk full")
    monkeypatch.setattr(toy, "write_mp4", fail)
    with pytest.raises(OSError, match="disk full"):
        toy.render(tmp_path / "w", **SMALL)
    assert os.listdir(tmp_path) == []


def test_the_rest_of_a_killed_run_is_no_obstacle_and_an_empty_folder_is_none(tmp_path):
    (tmp_path / "w.part" / "videos").mkdir(parents=True)
    (tmp_path / "w").mkdir()
    toy.render(tmp_path / "w", clips=1, images=0, captioned=0, size=32)
    assert os.listdir(tmp_path) == ["w"]
    assert read(next((tmp_path / "w").rglob("*.mp4"))).shape == (300, 32, 32, 3)


@pytest.mark.parametrize("arguments, message", [
    (["{}/full"], "is there already"),
    (["{}/full/file"], "is there already"),
    (["/dev/null/world"], "Not a directory"),
    (["{}/new", "--size", "33"], "must be even"),
    (["{}/new", "--clips", "-1"], "must not be negative"),
    (["{}/new", "--clips", "many"], "invalid int"),
])
def test_bad_commands_say_so_in_one_line(tmp_path, arguments, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    done = subprocess.run([sys.executable, "-m", "lab.toy", *[word.format(tmp_path) for word in arguments]],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == ["full"]


# ---------------------------------------------------------------------------------------------------------------------
# Grading what is right

TRUE = st.fixed_dictionaries({
    "color": st.sampled_from([*toy.COLORS]), "shape": st.sampled_from(toy.SHAPES),
    "direction": st.sampled_from([*toy.DIRECTIONS]), "background": st.sampled_from([*toy.BACKGROUNDS]),
    "fps": st.sampled_from([4, 8, 15, 30, 60]), "seed": seeds})


@quick
@given(TRUE)
def test_true_clips_are_right(what):
    grade = toy.grade(clip(**what))
    assert answers(grade) == (what["color"], what["shape"], what["direction"], what["background"], False)
    assert grade.speed == pytest.approx(toy.SPEED / what["fps"], rel=0.03)
    assert grade.centers.shape == (16, 2) and not np.isnan(grade.centers).any()


@quick
@given(TRUE)
def test_true_clips_are_right_when_blurred_and_noisy(what):
    noise = np.random.default_rng(what["seed"]).normal(0, 4, (16, 64, 64, 3))
    video = (blurred(clip(**what), 0.7) + noise).round().clip(0, 255).astype(np.uint8)
    grade = toy.grade(video)
    assert answers(grade) == (what["color"], what["shape"], what["direction"], what["background"], False)
    assert grade.speed == pytest.approx(toy.SPEED / what["fps"], rel=0.15)


def test_true_clips_are_right_after_h264(tmp_path):
    for i, (color, shape, direction) in enumerate(ALL[::2]):
        background, fps = list(toy.BACKGROUNDS)[i % 4], (4, 8, 15, 30, 60)[i % 5]
        toy.write_mp4(tmp_path / "a.mp4", clip(color, shape, direction, background, 60, i, frames=15 * 60 // fps + 1))
        grade = toy.grade(read(tmp_path / "a.mp4")[::60 // fps][:16])
        assert answers(grade) == (color, shape, direction, background, False), (i, fps)
        assert grade.speed == pytest.approx(toy.SPEED / fps, rel=0.12)


@pytest.mark.parametrize("size, frames", [(32, 16), (128, 16), (64, 8), (64, 32), (64, 3)])
def test_other_sizes_and_lengths(size, frames):
    for seed, (color, shape, direction) in enumerate(ALL[::7]):
        grade = toy.grade(clip(color, shape, direction, "teal", 8, seed, frames, size))
        assert answers(grade) == (color, shape, direction, "teal", False)
        assert grade.speed == pytest.approx(1.25, rel=0.03)


def test_stills_do_not_move_and_unrelated_frames_have_no_direction():
    rng = np.random.default_rng(0)
    for color, shape, background in [*product(toy.COLORS, toy.SHAPES, toy.BACKGROUNDS)][::3]:
        still = toy.trajectory(None, [0], rng).repeat(16, 0)
        grade = toy.grade(toy.draw(color, shape, background, still))
        assert answers(grade) == (color, shape, "still", background, False)
        loose = np.concatenate([toy.trajectory(None, [0], rng) for _ in range(16)])
        grade = toy.grade(toy.draw(color, shape, background, loose))
        assert answers(grade) == (color, shape, None, background, False) and np.isnan(grade.speed)
        np.testing.assert_allclose(grade.centers - loose, (grade.centers - loose)[:1].repeat(16, 0), atol=0.2)


# ---------------------------------------------------------------------------------------------------------------------
# Grading what is wrong


def test_blank_and_noise():
    blank = np.full((16, 64, 64, 3), toy.BACKGROUNDS["teal"], np.uint8)
    grade = toy.grade(blank)
    assert answers(grade) == (None, None, None, "teal", False)
    assert np.isnan(grade.centers).all() and np.isnan(grade.speed)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        noise = rng.integers(0, 256, blank.shape, dtype=np.uint8)
        assert answers(toy.grade(noise))[:4] == (None,) * 4
        soft = blurred(noise, 1.5)
        soft = ((soft - 127) * 5 + 127).clip(0, 255).astype(np.uint8)
        assert answers(toy.grade(soft))[:4] == (None,) * 4


def test_backgrounds_that_are_none():
    video = clip(direction="down")
    halves = video.copy()
    halves[:, :, :32] = clip(direction="down", background="teal")[:, :, :32]
    assert toy.grade(halves).background is None
    halves = video.copy()
    halves[::2] = clip(direction="down", background="teal")[::2]  # every other frame
    assert toy.grade(halves).background is None
    between = (clip(background="gray") / 2 + clip(background="teal") / 2).astype(np.uint8)
    assert toy.grade(between).background is None
    assert toy.grade(np.full((16, 64, 64, 3), 255, np.uint8)).background is None


def test_two_shapes_are_a_wrong_cut():
    one, two = clip(direction="right", seed=1), clip(direction="right", seed=2)
    assert not toy.grade(one).wrong_cut and not toy.grade(two).wrong_cut
    both = np.maximum(one, two)
    assert toy.grade(both).wrong_cut
    once = one.copy()
    once[7] = both[7]
    grade = toy.grade(once)  # in a single frame: still a wrong cut, all else is right
    assert answers(grade) == ("red", "circle", "right", "black", True)


def test_specks_are_no_shapes():
    video = clip(direction="right", seed=1)  # at y = 55
    video[:, 20:22, 30:40] = 255  # a line of 2 px
    assert answers(toy.grade(video)) == ("red", "circle", "right", "black", False)
    video[3, 19:22, 30:33] = 255  # 3 x 3 px
    assert toy.grade(video).wrong_cut


@pytest.mark.parametrize("rows, cols", [(4, 4), (2, 8), (1, 16)])
def test_a_shape_cut_at_the_border(rows, cols):
    """Half of it in one cell, half in the next: each cell shows one piece, so only the border tells."""
    rng = np.random.default_rng(0)
    centers = np.full((16, 2), 32.0) + rng.uniform(-5, 5, (16, 2))
    whole = toy.draw("red", "square", "black", centers)
    for dy, dx in ((32, 0), (0, 32), (-32, 0), (0, -32)):
        if dy and rows == 1:
            continue
        rolled = roll_grid(whole, dy, dx, rows, cols)
        assert toy.grade(rolled, (rows, cols)).wrong_cut
    assert not toy.grade(whole, (rows, cols)).wrong_cut


def test_only_neighbours_in_the_grid_share_a_border():
    """Frames t and t + 1 lie below each other, frames t and t + rows beside each other, and nothing else touches."""
    for frames, sides, wrong in (((5, 6), "below", True), ((3, 4), "below", False), ((5, 9), "beside", True),
                                 ((5, 6), "beside", False), ((5, 8), "beside", False)):
        video = np.zeros((16, 64, 64, 3), np.uint8)
        first, second = (np.s_[58:, 20:30], np.s_[:6, 20:30]) if sides == "below" else (np.s_[20:30, 58:],
                                                                                       np.s_[20:30, :6])
        video[frames[0]][first] = video[frames[1]][second] = 255
        assert toy.grade(video, (4, 4)).wrong_cut is wrong, (frames, sides)
        video[frames[1]][second] = 0
        video[frames[1]][second[::-1]] = 255  # elsewhere on the border, or on another border
        assert not toy.grade(video, (4, 4)).wrong_cut
    with pytest.raises(toy.ToyError, match="16 frames make no grid of 3 x 5"):
        toy.grade(video, (3, 5))


def test_shapes_close_to_both_sides_of_a_border_are_not_cut():
    """Stills may lie a pixel from it on both sides, and blurred ones touch it faintly."""
    video = np.concatenate([toy.draw("white", "square", "black", [[6.75, 32]]),
                            toy.draw("white", "square", "black", [[57.25, 32]])] * 8)
    assert not toy.grade(video, (4, 4)).wrong_cut
    assert not toy.grade(blurred(video, 0.7).round().astype(np.uint8), (4, 4)).wrong_cut


def test_hue_between_two_colours_has_no_name():
    circle = lambda y, x: np.hypot(y, x) < toy.EXTENT / 2  # noqa: E731
    for one, two in combinations(toy.COLORS.values(), 2):
        grade = toy.grade(painted(circle, np.add(one, two) / 2))
        assert grade.color is None and grade.shape == "circle" and grade.direction == "down"


def test_blinking_colours_have_no_name():
    video = clip("red")
    video[::3] = clip("green")[::3]
    assert toy.grade(video).color is None


def test_a_shape_missing_from_many_frames_is_none():
    video = clip("red")
    video[:2] = 0
    grade = toy.grade(video)
    assert answers(grade) == ("red", "circle", "right", "black", False)
    assert np.isnan(grade.centers[:2]).all() and not np.isnan(grade.centers[2:]).any()
    video[:3] = 0
    assert answers(toy.grade(video)) == (None, None, None, "black", False)


@pytest.mark.parametrize("inside", [
    lambda y, x: (abs(y) < 3) & (abs(x) < 9),  # a bar
    lambda y, x: (np.hypot(y, x) < 6) & (np.hypot(y, x) > 2.5),  # a ring
    lambda y, x: (np.hypot(y, x) < 7) & (y > 0),  # half a circle
    lambda y, x: y**4 + x**4 < 5.75**4,  # between circle and square
    lambda y, x: abs(y) + abs(x) < 8,  # a diamond
    lambda y, x: (y > -5.75) & (2 * abs(x) + y < 5.75),  # a triangle upside down
    lambda y, x: (abs(y) < 4.5) & (abs(x) < 6.5),  # an oblong
    lambda y, x: np.hypot(y / 1.6, x) < 5,  # an ellipse
])
def test_blobs_are_no_shapes(inside):
    grade = toy.grade(painted(inside))
    assert (grade.shape, grade.direction, grade.background, grade.wrong_cut) == (None, "down", "black", False)


def test_diagonal_and_erratic_motion_has_no_direction():
    steps = np.arange(16)[:, None] - 8
    for way, direction in (((1, 1), None), ((1, -0.7), None), ((-1, 0.3), "up"), ((0.2, 1), "right")):
        assert toy.grade(toy.draw("red", "circle", "black", 32 + steps * way)).direction == direction
    back_and_forth = np.stack([np.full(16, 32), 32 + 10 * np.sin(np.arange(16))], 1)
    assert toy.grade(toy.draw("red", "circle", "black", back_and_forth)).direction is None


def test_a_jump_or_two_do_not_hide_the_direction():
    video = clip(direction="left", fps=8, seed=1)
    video[[4, 11]] = clip(direction="right", fps=8, seed=2)[[4, 11]]
    grade = toy.grade(video)
    assert grade.direction == "left" and grade.speed == pytest.approx(1.25, rel=0.1)
