"""Grading: what a video of the toy world shows, read back from its pixels. Thresholds are in world pixels and RGB
levels; None always means "cannot tell"."""

import math
from dataclasses import dataclass
from functools import cache
from itertools import permutations

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
    wrong_cut: bool  # in any frame: more shapes than there should be, or one cut by the cell's border
    centers: np.ndarray  # (T, 2) centroids in world pixels (64 to a frame's shorter side), NaN where no shape was found
    speed: float  # world pixels a frame, NaN where the positions are on no line
    areas: np.ndarray  # (T,) world pixels that the shape covers, and
    paints: np.ndarray  # (T, 3) its colour, both NaN where no shape was found


def grade(video, grid=None) -> Grade:
    """Read a clip of the toy world back, uint8 (T, H, W, 3).

    grid is (rows, cols) of the image the frames were generated in, frame t at row t % rows and column t // rows; when
    None, the factor pair of T nearest to a square. Only wrong_cut depends on it.
    """
    return grade_bodies(video, grid, find_body)[0]


def grade_pair(video, grid=None) -> list[Grade]:
    """Read back a clip of two shapes, in no order, as `grade` does one.

    Background and wrong_cut are the video's, the same in both. Here a frame is wrongly cut that shows three or more
    shapes, two of the same one (both in the colour of one of the two, when these differ), or one that is cut by the
    cell's border.
    """
    return grade_bodies(video, grid, find_pair)


def grade_bodies(video, grid, find) -> list[Grade]:
    """Grade each of the shapes that find(video, distance, scale) tells apart: see `find_body`."""
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
    background = name_of(ring.reshape(-1, 3), BACKGROUNDS)
    bodies, cut = find(video, distance, scale)
    # the outline of a blurred shape is where half of it is left
    halves = [np.quantile(distance[body], 0.9) / 2 if body.any() else np.inf for body in bodies]
    outline = np.full(distance.shape, min(halves))
    for body, half in zip(bodies, halves):
        outline[body] = half
    cut |= is_cut((distance > outline).reshape(cols, rows, height, width))
    return [grade_body(video, backdrop, body, body & (distance > half), scale, background, cut)
            for body, half in zip(bodies, halves)]


def grade_body(video, backdrop, body, inner, scale, background, cut) -> Grade:
    """Grade a shape by the pixels (T, H, W) that it may touch, and those inside its outline."""
    frames, found, away = len(video), body.any((1, 2)), video - backdrop[:, None, None]
    answer = Grade(None, None, None, background, cut, np.full((frames, 2), np.nan), math.nan, np.full(frames, np.nan),
                   np.full((frames, 3), np.nan))
    if not found.any():
        return answer
    # the colour of the pixels furthest inside tells how much of every other pixel is covered
    depth = box_mean(inner, max(1, round(2 * scale)))
    core = body & (depth >= 0.95 * depth.max((1, 2), keepdims=True))
    paint = np.median(video[core], axis=0) - backdrop[:, None, None]  # (T, 1, 1, 3), from the background to the shape
    covered = np.clip(np.einsum("...c,...c->...", away, paint) / (paint**2).sum(-1).clip(1), 0, 1)
    covered *= box_mean(body, max(1, round(scale))) > 0  # the shape and its soft outline, none of the noise elsewhere
    found &= covered.sum((1, 2)) > (SPECK * scale)**2
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
# Where the shapes are


def find_body(video, distance, scale):
    """Find the shape by the distance (T, H, W) of each pixel from the background.

    Returns [the mask (T, H, W) of each frame's largest, empty where there is none], and whether any has several.
    """
    parts, _, sizes = find_parts(distance, scale)
    found = (sizes.max(1) > 0) & (sizes.max(1) < BLOB * scale**2)
    body = (parts == sizes.argmax(1)[:, None, None] + 1) & found[:, None, None]
    return [body], bool(((sizes > 0).sum(1) > 1).any())


def find_pair(video, distance, scale):
    """As `find_body`, the masks of two shapes: the two largest of each frame, followed from frame to frame by colour
    and place, of which a level and a world pixel count alike, so that colours that differ decide."""
    parts, thick, sizes = find_parts(distance, scale)
    several = (sizes > 0).sum(1) > 2
    sizes[sizes >= BLOB * scale**2] = 0
    looks = []  # of each frame, a list of (mask, colour and place)
    for frame, part, middles, counts in zip(video, parts, thick, sizes):
        masks = [part == label + 1 for label in np.argsort(-counts, kind="stable")[:2] if counts[label]]
        looks.append([(mask, np.array([*np.median(frame[mask & middles], axis=0), *np.argwhere(mask).mean(0) / scale]))
                      for mask in masks])
    bodies, colors = np.zeros((2, *parts.shape), bool), np.full((2, len(looks), 3), np.nan)
    for t, order in linked([[seen for _, seen in look] for look in looks]):
        for k, (mask, seen) in zip(order, looks[t]):
            bodies[k, t], colors[k, t] = mask, seen[:3]
    both = ~np.isnan(colors).any((0, 2))
    if both.any():
        usual = np.nanmedian(colors, axis=1, keepdims=True)
        own, other = (np.linalg.norm(colors - paint, axis=2) for paint in (usual, usual[::-1]))
        several |= both & (own > other).any(0) & (np.linalg.norm(usual[0] - usual[1]) > FAINT)
    return list(bodies), bool(several.any())


def linked(looks):
    """Yield (t, the number 0 or 1 of each shape in frame t), from the first frame of two on, then from there back.

    looks  a list of vectors for each frame; a number goes where the sum of the ways from the last ones is least
    """
    start = max(range(len(looks)), key=lambda t: len(looks[t]))
    for times in (range(start, len(looks)), range(start - 1, -1, -1)):
        last = list(looks[start])
        for t in times:
            orders = list(permutations(range(len(last)), len(looks[t])))
            ways = [sum(np.linalg.norm(last[k] - look) for k, look in zip(order, looks[t])) for order in orders]
            order = orders[np.argmin(ways)]
            for k, look in zip(order, looks[t]):
                last[k] = look
            yield t, order


def find_parts(distance, scale):
    """Separate what is no background: labels (T, H, W), see `components`, the middles (T, H, W) of all squares that
    fit in, and sizes (T, H W), how many fit into label 1, 2, ...: none into what is too thin for a shape."""
    parts = components(distance > FAINT)
    thick = box_mean(parts > 0, max(1, round((SPECK * scale - 1) / 2))) == 1  # the middles of squares that fit
    sizes = np.stack([np.bincount(frame.ravel(), minlength=parts[0].size + 1) for frame in parts * thick])[:, 1:]
    return parts, thick, sizes


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
