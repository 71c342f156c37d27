"""The toy world: one coloured shape, at level 2 two, moving over a flat background. Renders its files, and grades
videos of it.

    python -m lab.toy DIR

It takes the place of WebVid, CIFAR-like labelled images and captioned images where nothing may be downloaded, and
every prompt of it has a right answer, so what a model made of a prompt can be graded. A *scene* holds the words of a
clip: (color, shape, direction) of each shape, one after the other, and the background.

Lengths are in world pixels, 64 to a frame, whatever the frame's real size; positions are (y, x), y down, and pixel i
covers i to i + 1, so the middle of a frame is (32, 32).
"""

from lab.toy.grader import Grade, grade, grade_pair
from lab.toy.world import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    EXTENT,
    MARGIN,
    SECONDS,
    SHAPES,
    SIZE,
    SPEED,
    caption,
    coverage,
    describe,
    draw,
    draw_scene,
    expected,
    pairs,
    render,
    scenes,
    things,
    trajectory,
    triples,
    true_render,
)

__all__ = ["BACKGROUNDS", "COLORS", "DIRECTIONS", "EXTENT", "MARGIN", "SECONDS", "SHAPES", "SIZE", "SPEED", "Grade",
           "caption", "coverage", "describe", "draw", "draw_scene", "expected", "grade", "grade_pair", "pairs",
           "render", "scenes", "things", "trajectory", "triples", "true_render"]
