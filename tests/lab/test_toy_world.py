"""The toy world: its words, its drawings, and its files as other programs read them."""

import csv
import hashlib
import json
import os
from collections import Counter
from itertools import combinations, product
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_toy_grader import ALL, answers, quick, quicker, read

from lab import toy
from lab.toy import world as module

SMALL = {"clips": 3, "images": 1, "captioned": 5}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "world"
    toy.render(folder, seed=3, **SMALL, workers=2)
    assert len(files(folder)) == 3 + 72 + 5 + 3  # the lists and world.json
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
    with pytest.raises(ValueError, match="split must be train, val or test, got 'tset'"):
        toy.triples("tset")


def test_pairs_of_level_2():
    """Held-out pairs are new in their subjects, whatever the direction; all of their parts are trained."""
    train, val, test = (toy.pairs(split) for split in ("train", "val", "test"))
    assert (len(train), len(set(train)), len(val), len(test)) == (1080, 1080, 5, 10)
    together = [{frozenset((pair[:2], pair[3:5])) for pair in split} for split in (train, val, test)]
    assert [len(subjects) for subjects in together] == [120, 5, 10] and not together[1] & (together[0] | together[2])
    assert not together[0] & together[2]
    trained = set(toy.triples("train"))
    for pair in train + val + test:
        assert {pair[:3], pair[3:]} <= trained and pair[0] != pair[3]
    for pair in val + test:
        assert not set(pair[:3]) & set(pair[3:])  # so that any mixing up shows
    assert {frozenset((pair[0], pair[3])) for pair in val + test} == set(map(frozenset, combinations(toy.COLORS, 2)))
    words = Counter(word for pair in test for word in pair)
    assert [{words[word] for word in names} <= set(range(least, least + 2)) for names, least in
            ((toy.COLORS, 3), (toy.SHAPES, 6), (toy.DIRECTIONS, 5))] == [True] * 3
    text = repr((toy.pairs("val"), toy.pairs("test"))).encode()  # published numbers are of these
    assert hashlib.sha256(text).hexdigest().startswith("13ba9928f95d9199")
    with pytest.raises(ValueError, match="split must be train, val or test, got 'tset'"):
        toy.pairs("tset")


def test_scenes_of_level_2_are_told_in_both_orders():
    scenes = toy.scenes("val", 2)
    assert [toy.describe(scene) for scene in scenes[:2]] == [
        "a red triangle moving left and a blue square moving up on a black background",
        "a blue square moving up and a red triangle moving left on a gray background"]
    assert len(scenes) == 20 and {scene[-1] for scene in scenes} == {*toy.BACKGROUNDS}
    assert toy.things(scenes[1]) == [("blue", "square", "up"), ("red", "triangle", "left")]
    assert toy.describe(("red", "circle", None, "blue", "square", None, None)) == "a red circle and a blue square"
    for scene in toy.scenes("test"):
        assert toy.describe(scene) == toy.caption(*scene) and toy.things(scene) == [scene[:3]]


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
@given(st.integers(0, 2**32), st.sampled_from([*ALL]), st.sampled_from([*toy.BACKGROUNDS]), st.sampled_from([32, 64]))
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


@quicker
@given(st.integers(0, 2**32), st.sampled_from(toy.scenes("train", 2)), st.sampled_from([32, 64]))
def test_two_shapes_stay_apart_and_move_as_told(seed, scene, size):
    times = np.linspace(0, toy.SECONDS, 61)
    paths = module.trajectories(scene, times, np.random.default_rng(seed), size)
    assert paths.shape == (2, 61, 2)
    boxes = np.abs(paths[0] - paths[1]).max(1) * 64 / size - toy.EXTENT
    assert boxes.min() >= module.GAP - 1e-9
    frames = toy.draw_scene(scene, paths, size)
    for (color, _, direction), path in zip(toy.things(scene), paths):
        steps = np.array(toy.DIRECTIONS[direction]) * np.diff(times)[:, None] * toy.SPEED * size / 64
        np.testing.assert_allclose(np.diff(path, axis=0), steps, atol=1e-9)
        assert path.min() >= 6.75 * size / 64 - 1e-9 and path.max() <= 57.25 * size / 64 + 1e-9
        inside = tuple(path[7].astype(int))
        assert tuple(frames[7][inside]) == toy.COLORS[color]
    alone = [toy.draw(color, shape, scene[-1], path, size) for (color, shape, _), path in zip(toy.things(scene), paths)]
    backdrop = np.array(toy.BACKGROUNDS[scene[-1]])
    np.testing.assert_array_equal(frames, alone[0].astype(int) + alone[1] - backdrop)


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
    assert json.loads((world / "world.json").read_text()) == {"seed": 3, "size": 64, **SMALL}


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
    seen = []
    monkeypatch.setattr(module, "draw", lambda color, shape, background, centers, size: [(color, shape, background)])
    monkeypatch.setattr(module, "write_mp4", lambda path, frames: seen.append(frames[0]))
    monkeypatch.setattr(module.Image, "fromarray", lambda pixels: Image.new("RGB", (1, 1)))
    toy.render(tmp_path / "w", clips=432, images=0, captioned=720, workers=1)
    rows = list(csv.reader(open(tmp_path / "w" / "videos.csv")))[1:]
    drawn = Counter((*what, toy.expected(row[4])[2]) for what, row in zip(seen, rows, strict=True))
    assert drawn == {(c, s, b, d): 2 for c, s, d in toy.triples("train") for b in toy.BACKGROUNDS}
    texts = [json.loads(line)["caption"] for line in open(tmp_path / "w" / "images.jsonl")]
    for captions in ([row[4] for row in rows], texts):
        assert 0.19 < np.mean(["background" not in text for text in captions]) < 0.31


def test_a_world_of_level_2_holds_one_of_level_1(world, tmp_path):
    """Every other file is that of level 1, to the bit; those between are of two shapes, and true."""
    counts = {"clips": 2 * SMALL["clips"] - 1, "images": 1, "captioned": 2 * SMALL["captioned"] - 1}
    toy.render(tmp_path / "w", seed=3, **counts, level=2, workers=2)
    both = tmp_path / "w", world
    rows, ours = ([*csv.DictReader(open(folder / "videos.csv"))] for folder in both)
    lines, our_lines = ([json.loads(line) for line in open(folder / "images.jsonl")] for folder in both)

    def same(one, other):
        return (both[0] / one).read_bytes() == (both[1] / other).read_bytes()

    shown = []  # (frames, caption) of two shapes
    for n, row in enumerate(rows):
        if n % 2:
            shown.append((read(tmp_path / "w" / row["contentUrl"])[::20][:15], row["name"]))
        else:
            assert row["name"] == ours[n // 2]["name"]
            assert same(row["contentUrl"], ours[n // 2]["contentUrl"])
    for n, line in enumerate(lines):
        if n % 2:
            shown.append((read(tmp_path / "w" / line["path"]), line["caption"]))
        else:
            assert line["caption"] == our_lines[n // 2]["caption"]
            assert same(line["path"], our_lines[n // 2]["path"])
    train = {pair for one in toy.pairs("train") for pair in (one, module.swapped(one))}
    for frames, text in shown:
        seen = toy.grade_pair(frames)
        (*one, background), (*two, last) = map(toy.expected, text.split(" and "))
        assert background is None and seen[0].background in (last, *[seen[0].background] * (last is None))
        assert {(each.color, each.shape, each.direction) for each in seen} == {tuple(one), tuple(two)}
        assert (*one, *two) in train if len(frames) > 1 else one[2] is two[2] is None and one[0] != two[0]
    labels = [{path: data for path, data in files(folder).items() if path.parts[0] == "labels"} for folder in both]
    assert labels[0] == labels[1] and len(labels[0]) == 72
    assert json.loads((tmp_path / "w" / "world.json").read_text())["level"] == 2


def test_half_a_world_is_never_there(tmp_path, monkeypatch):
    def fail(path, frames):
        raise OSError("disk full")
    monkeypatch.setattr(module, "write_mp4", fail)
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
    (["{}/new", "--size", "33"], "size must be even"),
    (["{}/new", "--size", "14"], ">= 16, got 14"),
    (["{}/new", "--clips", "-1"], "clips must be >= 0, got -1"),
    (["{}/new", "--level", "3"], "level must be in 1..2, got 3"),
    (["{}/new", "--clips", "many"], "clips: must be a whole number, got 'many'"),
])
def test_bad_commands_say_so_in_one_line(run, tmp_path, arguments, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    done = run("lab.toy", *[word.format(tmp_path) for word in arguments])
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == ["full"]
