"""The grader of the toy world: on what is right, and on what is not."""

from itertools import combinations, product

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import toy
from lab.toy.world import write_mp4

ALL = list(product(toy.COLORS, toy.SHAPES, toy.DIRECTIONS))
quick = settings(max_examples=60, deadline=None)
quicker = settings(max_examples=25, deadline=None)


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


# ---------------------------------------------------------------------------------------------------------------------
# Grading what is right

TRUE = st.fixed_dictionaries({
    "color": st.sampled_from([*toy.COLORS]), "shape": st.sampled_from(toy.SHAPES),
    "direction": st.sampled_from([*toy.DIRECTIONS]), "background": st.sampled_from([*toy.BACKGROUNDS]),
    "fps": st.sampled_from([4, 8, 15, 30, 60]), "seed": st.integers(0, 2**32)})


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
        write_mp4(tmp_path / "a.mp4", clip(color, shape, direction, background, 60, i, frames=15 * 60 // fps + 1))
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
    with pytest.raises(ValueError, match="a cell for each of 16 frames, got 3 x 5"):
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


# ---------------------------------------------------------------------------------------------------------------------
# Two shapes

PAIRS = st.fixed_dictionaries({"scene": st.sampled_from(toy.scenes("train", 2)), "seed": st.integers(0, 2**32),
                               "fps": st.sampled_from([4, 8, 15, 30, 60])})


def pair_clip(scene, seed=0, fps=8):
    return toy.true_render(scene, np.random.default_rng(seed), 16, fps)


def pair_answers(video):
    """(what is read of each shape, sorted, background, wrong cut)."""
    one, two = toy.grade_pair(video)
    assert (one.background, one.wrong_cut) == (two.background, two.wrong_cut)
    read = [tuple(map(str, (seen.color, seen.shape, seen.direction))) for seen in (one, two)]
    return *sorted(read), one.background, one.wrong_cut


def right(scene, cut=False):
    return *sorted(toy.things(scene)), scene[-1], cut


@quicker
@given(PAIRS)
def test_true_pairs_are_right(what):
    assert pair_answers(pair_clip(**what)) == right(what["scene"])


@quicker
@given(PAIRS)
def test_true_pairs_are_right_when_blurred_and_noisy(what):
    noise = np.random.default_rng(what["seed"]).normal(0, 4, (16, 64, 64, 3))
    video = (blurred(pair_clip(**what), 0.7) + noise).round().clip(0, 255).astype(np.uint8)
    assert pair_answers(video) == right(what["scene"])


def test_two_shapes_are_followed():
    """By colour where they jump about, by place where they are of one colour."""
    scene = ("red", "circle", "right", "blue", "square", "left", "black")
    still = np.array([[[20, 20]], [[45, 45]]]).repeat(16, 1)
    jumping = np.where((np.arange(16) % 2)[None, :, None], still, still[::-1])
    read = pair_answers(toy.draw_scene(scene, jumping))
    assert read == (("blue", "square", "None"), ("red", "circle", "None"), "black", False)
    alike = ("red", "circle", "right", "red", "square", "left", "black")
    assert pair_answers(pair_clip(alike, 1)) == right(alike)
    same = ("red", "circle", "right", "red", "circle", "left", "teal")  # past each other, to where the other began
    video = toy.draw_scene(same, np.stack([[15, 12 + 2 * t] for t in range(16)] + [[31, 50 - 2 * t] for t in range(16)]
                                          ).reshape(2, 16, 2))
    assert pair_answers(video) == right(same)
    for seen in toy.grade_pair(video):
        assert abs(seen.speed - 2) < 0.05 and np.ptp(seen.centers[:, 0]) < 0.5


def test_pairs_with_a_shape_missing():
    scene = ("red", "circle", "right", "blue", "square", "up", "gray")
    alone = clip("red", "circle", "right", "gray")
    assert pair_answers(alone) == (("None",) * 3, ("red", "circle", "right"), "gray", False)
    blank = np.full_like(alone, toy.BACKGROUNDS["gray"][0])
    assert pair_answers(blank) == (("None",) * 3, ("None",) * 3, "gray", False)
    paths = np.stack([[[20, 12]] + np.arange(16)[:, None] * [0, 2], [[50, 57]] - np.arange(16)[:, None] * [2, 0]])
    video = toy.draw_scene(scene, paths)
    without = toy.draw("red", "circle", "gray", paths[0])
    video[[0, 9]] = without[[0, 9]]  # in 2 of 16 frames, the first among them
    assert pair_answers(video) == right(scene)
    video[4] = without[4]
    assert pair_answers(video) == (("None",) * 3, ("red", "circle", "right"), "gray", False)


def test_wrong_cuts_of_pairs():
    scene = ("red", "circle", "right", "blue", "square", "left", "black")
    paths = np.stack([[[15, 12]] + np.arange(16)[:, None] * [0, 2], [[30, 50]] - np.arange(16)[:, None] * [0, 2]])
    video = toy.draw_scene(scene, paths)
    assert pair_answers(video) == right(scene)
    third = video.copy()
    third[7] = np.maximum(third[7], toy.draw("green", "circle", "black", [[50, 30]])[0])  # in a single frame
    assert pair_answers(third) == right(scene, True)
    twice = toy.draw("red", "circle", "black", paths[0])
    once = video.copy()
    once[7] = np.maximum(twice[7], toy.draw("red", "circle", "black", [[50, 30]])[0])  # no blue one there, two red ones
    assert toy.grade_pair(once)[0].wrong_cut
    both_red = toy.draw_scene(("red", "circle", "right", "red", "square", "left", "black"), paths)
    assert not toy.grade_pair(both_red)[0].wrong_cut  # in every frame: a wrong colour, cut it is not
    rolled = roll_grid(toy.draw_scene(scene, np.stack([np.full((16, 2), 32), np.full((16, 2), [32, 55])])), 32, 0)
    assert toy.grade_pair(rolled, (4, 4))[0].wrong_cut
    edges = np.stack([np.tile([6.75, 20], (16, 1)), np.tile([57.25, 20], (16, 1))])
    assert not toy.grade_pair(toy.draw_scene(("white", "square", "up", "blue", "circle", "up", "black"), edges),
                              (4, 4))[0].wrong_cut  # on both sides of a border, a pixel from it
