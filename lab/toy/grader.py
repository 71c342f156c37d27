"""Grading: what a video of the toy world shows, read back from its pixels. Thresholds are in world pixels and RGB
levels; None always means "cannot tell"."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from grid import largest_factor
from lab.toy.world import BACKGROUNDS, COLORS, DIRECTIONS, EXTENT, SHAPES, SIZE, coverage

FAINT = 48      # RGB distance from the background up to which a pixel counts as such: noise reaches 20, shapes 120
SPECK = 3       # px: a blob that no square of this side fits into is no shape; moving edges leave thin lines in H.264
BLOB = 400      # px: a blob that so many of those squares fit into is none either; a blurred shape of ours has 150
AGREE = 0.85    # share of pixels, or frames, that must agree before they have one answer: at most 2 frames of 16 err
STILL = 0.08    # px a frame: half of the slowest true motion, SPEED at 60 FPS
ERRATIC = 2     # px: when half of the positions are further off a straight line, there is no direction
WINDOW = 20     # px a side of the window in which shapes are compared
ALIKE = 0.96    # correlation with a template, at least
CLEARLY = 0.7   # the nearest answer must be closer than this share of the second nearest's distance, else there is none


@dataclass
class Grade:
    """What a video shows. A name is None where it cannot be told, which callers count as wrong."""

    color: str | None
    shape: str | None
    direction: str | None  # of DIRECTIONS, or "still"
    background: str | None
    wrong_cut: bool  # in any frame: two or more shapes, or one cut by the cell's border
    centers: np.ndarray  # (T, 2) centroids in world pixels (64 to a frame's shorter side), NaN where no shape was found
    speed: float  # world pixels a frame, NaN where the positions are on no line
    areas: np.ndarray  # (T,) world pixels that the shape covers, and
    paints: np.ndarray  # (T, 3) its colour, both NaN where no shape was found


def grade(video, grid=None) -> Grade:
    """Read a clip of the toy world back, uint8 (T, H, W, 3).

    grid is (rows, cols) of the image the frames were generated in, frame t at row t % rows and column t // rows; when
    None, the factor pair of T nearest to a square. Only wrong_cut depends on it.
    """
    frames, height, width, _ = video.shape
    rows, cols = grid or (largest_factor(frames), frames // largest_factor(frames))
    if rows * cols != frames:
        raise ValueError(f"grid must have a cell for each of {frames} frames, got {rows} x {cols}")
    scale = min(height, width) / SIZE
    video = video.astype(np.float32)
    ring = np.concatenate([video[:, 0], video[:, -1], video[:, 1:-1, 0], video[:, 1:-1, -1]], axis=1)  # (T, ., 3)
    backdrop = np.median(ring, axis=1)  # (T, 3)
    away = video - backdrop[:, None, None]
    distance = np.sqrt(np.einsum("...c,...c->...", away, away))  # (T, H, W)
    body, found, crowded = find_bodies(distance, scale)
    answer = Grade(None, None, None, name_of(ring.reshape(-1, 3), BACKGROUNDS), bool(crowded.any()),
                   np.full((frames, 2), np.nan), math.nan, np.full(frames, np.nan), np.full((frames, 3), np.nan))
    if not found.any():
        return answer

    # the colour of the pixels furthest inside tells how much of every other pixel is covered
    half = np.quantile(distance[body], 0.9) / 2  # the outline of a blurred shape is where half of it is left
    depth = box_mean(body & (distance > half), max(1, round(2 * scale)))
    core = body & (depth >= 0.95 * depth.max((1, 2), keepdims=True))
    paint = np.median(video[core], axis=0) - backdrop[:, None, None]  # (T, 1, 1, 3), from the background to the shape
    covered = np.clip(np.einsum("...c,...c->...", away, paint) / (paint**2).sum(-1).clip(1), 0, 1)
    covered *= box_mean(body, max(1, round(scale))) > 0  # the shape and its soft outline, none of the noise elsewhere
    found &= covered.sum((1, 2)) > (SPECK * scale)**2
    answer.wrong_cut |= is_cut((distance > half).reshape(cols, rows, height, width))
    answer.centers[found] = centroids(covered[found]) / scale
    answer.areas[found] = covered[found].sum((1, 2)) / scale**2
    answer.paints[found] = [np.median(video[t][core[t]], axis=0) for t in np.flatnonzero(found)]
    if found.mean() < AGREE:
        return answer
    answer.color = name_of(video[core], COLORS)
    answer.shape = shape_of(covered[found], answer.centers[found] * scale, scale)
    answer.direction, answer.speed = motion_of(np.flatnonzero(found), answer.centers[found])
    return answer


# ---------------------------------------------------------------------------------------------------------------------
# Where the shape is


def find_bodies(distance, scale):
    """Find shapes by the distance (T, H, W) of each pixel from the background.

    Returns the mask (T, H, W) of each frame's largest, whether there is one (T,), and whether there are several (T,).
    """
    parts = components(distance > FAINT)
    thick = box_mean(parts > 0, max(1, round((SPECK * scale - 1) / 2))) == 1  # the middles of squares that fit
    sizes = np.stack([np.bincount(frame.ravel(), minlength=parts[0].size + 1) for frame in parts * thick])[:, 1:]
    found = (sizes.max(1) > 0) & (sizes.max(1) < BLOB * scale**2)
    body = (parts == sizes.argmax(1)[:, None, None] + 1) & found[:, None, None]
    return body, found, (sizes > 0).sum(1) > 1


def components(mask):
    """Labels (T, H, W) of the 8-connected components of masks (T, H, W): the number of their last pixel; 0 outside."""
    height, width = mask.shape[1:]
    labels = mask * np.arange(1, height * width + 1, dtype=np.int32).reshape(height, width)
    while True:  # the highest number of a component spreads, a pixel a turn
        padded = np.pad(labels, ((0, 0), (1, 1), (1, 1)))
        rows = np.maximum(np.maximum(padded[:, :-2], padded[:, 1:-1]), padded[:, 2:])
        spread = np.maximum(np.maximum(rows[..., :-2], rows[..., 1:-1]), rows[..., 2:]) * mask
        if np.array_equal(spread, labels):
            break
        labels = spread
    return labels


def box_mean(images, radius: int):
    """Mean of the square of 2 radius + 1 pixels around each pixel of images (T, H, W), zero outside."""
    (_, height, width), side = images.shape, range(2 * radius + 1)
    images = np.pad(images, ((0, 0), (radius, radius), (radius, radius)))
    lines = sum(images[:, i : i + height] for i in side) / len(side)
    return sum(lines[..., i : i + width] for i in side) / len(side)


def is_cut(solid) -> bool:
    """Whether a shape continues across a border between cells, in masks (cols, rows, H, W)."""
    below = solid[:, :-1, -1, :], solid[:, 1:, 0, :]  # the two sides of the borders between rows
    beside = solid[:-1, :, :, -1], solid[1:, :, :, 0]
    return any(bool(((one & two).sum(-1) >= 2).any()) for one, two in (below, beside))  # one pixel may be noise


def centroids(covered):
    """(T, 2) centers of mass of coverages (T, H, W), pixel i lying at i + 0.5."""
    mass = covered.sum((1, 2))
    y = (covered.sum(2) * (np.arange(covered.shape[1]) + 0.5)).sum(1)
    x = (covered.sum(1) * (np.arange(covered.shape[2]) + 0.5)).sum(1)
    return np.stack([y, x], axis=1) / mass[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# What it is


def name_of(pixels, palette):
    """Name the colour of pixels (N, 3) after a palette, if they agree and one name is clearly the nearest."""
    color = np.median(pixels, axis=0)
    near = np.sqrt(((pixels - color)**2).sum(-1)) < FAINT
    distances = np.sqrt(((np.array(list(palette.values())) - color)**2).sum(-1))
    first, second = np.sort(distances)[:2]
    clear = near.mean() >= AGREE and first < 60 and first < CLEARLY * second  # 60: half of what any two are apart
    return list(palette)[distances.argmin()] if clear else None


def shape_of(covered, centers, scale):
    """Name the shape in coverages (T, H, W) with centroids (T, 2), in pixels, by the templates it resembles most."""
    seen = standard(aligned(covered, centers, scale))
    likeness = np.array([(looks @ seen).max() for looks in templates()])
    second, first = np.sort(likeness)[-2:]
    return SHAPES[likeness.argmax()] if first > ALIKE and 1 - first < CLEARLY * (1 - second) else None


@cache
def templates():
    """Views of each true shape as `aligned` gives them, three sizes, sharp and blurred: a list of (6, pixels)."""
    middles = SIZE / 2 + np.stack(np.meshgrid([0, 0.25, 0.5, 0.75], [0, 0.25, 0.5, 0.75]), -1).reshape(-1, 2)
    looks = []
    for shape in SHAPES:
        sharp = [coverage(shape, middles, extent=EXTENT * growth) for growth in (0.9, 1, 1.1)]
        both = sharp + [box_mean(images, 1) for images in sharp]
        looks.append(np.stack([standard(aligned(images, centroids(images), 1)) for images in both]))
    return looks


def aligned(covered, centers, scale):
    """Mean over the frames of coverages (T, H, W), centers (T, 2) laid upon each other: (WINDOW, WINDOW) world px."""
    border = math.ceil(WINDOW / 2 * scale) + 1
    steps = (np.arange(WINDOW) + 0.5 - WINDOW / 2) * scale - 0.5 + border
    total = np.zeros((WINDOW, WINDOW))
    for image, (y, x) in zip(np.pad(covered, ((0, 0), (border, border), (border, border))), centers):
        top, down = np.divmod(y + steps, 1)
        left, right = np.divmod(x + steps, 1)
        top, left, down = top.astype(int), left.astype(int), down[:, None]
        lines = image[top] * (1 - down) + image[top + 1] * down
        total += lines[:, left] * (1 - right) + lines[:, left + 1] * right
    return total / len(covered)


def standard(image):
    """An image as a vector of mean 0 and length 1, so that the product of two is their correlation."""
    vector = image.ravel() - image.mean()
    return vector / max(np.linalg.norm(vector), 1e-6)


def motion_of(times, centers):
    """(direction, speed) of centers (N, 2) at frames times (N,), by the median of all slopes (Theil and Sen's fit)."""
    if len(times) < 3:
        return None, math.nan
    one, two = np.triu_indices(len(times), 1)
    slope = np.median((centers[two] - centers[one]) / (times[two] - times[one])[:, None], axis=0)  # (dy, dx) a frame
    off = centers - slope * times[:, None]
    off = np.abs(off - np.median(off, axis=0)).max(1)
    if np.median(off) > ERRATIC:
        return None, math.nan
    speed = float(np.hypot(*slope))
    if speed < STILL:
        return "still", speed
    # a cosine of 0.9 to an axis: one component is twice the other
    return next((name for name, axis in DIRECTIONS.items() if slope @ axis > 0.9 * speed), None), speed
