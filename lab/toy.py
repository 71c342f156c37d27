"""The toy world: one coloured shape moving over a flat background. Renders its files, and grades videos of it.

    python toy.py DIR [--seed S] [--clips N] [--images N] [--captioned N] [--moving] [--size PX]

It takes the place of WebVid, CIFAR-like labelled images and captioned images where nothing may be downloaded, and
every prompt of it has a right answer, so what a model made of a prompt can be graded.

Lengths are in world pixels, 64 to a frame, whatever the frame's real size; positions are (y, x), y down, and pixel i
covers i to i + 1, so the middle of a frame is (32, 32).
"""

import argparse
import csv
import json
import math
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import av
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

# Any two of these ten are at least 120 apart in RGB, so a colour that is off by half of that can still be named. Every
# shape also differs from every background by 30 in luma: an edge in chroma alone moves in jumps of 2 px in yuv420p.
COLORS = {"red": (255, 60, 50), "green": (40, 205, 50), "blue": (60, 100, 255),
          "yellow": (245, 225, 40), "white": (250, 250, 250), "purple": (190, 60, 230)}
BACKGROUNDS = {"black": (0, 0, 0), "gray": (170, 170, 170), "brown": (115, 50, 5), "teal": (0, 85, 100)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (dy, dx)

SIZE = 64        # pixels a side; a multiple of the 8 of Stable Diffusion's VAE
CLIP_FPS = 60    # the fastest FPS the model is trained on; the slower ones are read from the same file
SECONDS = 5      # 16 frames at 4 FPS span 3.75 s, so FPS 4 still has a choice of starts
SPEED = 10       # px a second: 2.5 px a frame at 4 FPS, 0.17 at 60
EXTENT = 11.5    # px across a shape: 11.5 + 50 of travel + 2 of margin leave 0.5 px of jitter along the motion
MARGIN = 1       # px between a shape and the frame's border, at least


class ToyError(Exception):
    """A mistake of the user's, told in one line."""


# ---------------------------------------------------------------------------------------------------------------------
# What there is, and how it is called


def triples(split):
    """List of (color, shape, direction) of "train" (54), "val" (6) or "test" (12): disjoint, and fixed for ever.

    Every (colour, shape) pair holds out one direction, its number being (colour + shape) mod 4. It is for validation
    where shape = colour + 1 (mod 3), one pair for each colour, and for the test in the other two.
    """
    if split not in ("train", "val", "test"):
        raise ToyError(f"no split {split!r}: train, val or test")
    chosen = []
    for c, color in enumerate(COLORS):
        for s, shape in enumerate(SHAPES):
            for d, direction in enumerate(DIRECTIONS):
                held_out = "val" if s == (c + 1) % 3 else "test"
                if split == (held_out if d == (c + s) % 4 else "train"):
                    chosen.append((color, shape, direction))
    return chosen


def scenes(split):
    """Every triple of a split on every background: list of (color, shape, direction, background)."""
    return [(*triple, background) for triple in triples(split) for background in BACKGROUNDS]


def caption(color, shape, direction=None, background=None):
    """The sentence for a clip, or for a still when there is no direction; without background it is not mentioned."""
    moving = f" moving {direction}" if direction else ""
    on = f" on a {background} background" if background else ""
    return f"a {color} {shape}{moving}{on}"


def expected(prompt):
    """(color, shape, direction, background) that a caption asks for, None for each one it does not mention."""
    words = re.findall(r"[a-z]+", prompt.lower())
    return tuple(next((word for word in words if word in names), None)
                 for names in (COLORS, SHAPES, DIRECTIONS, BACKGROUNDS))


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def coverage(shape, centers, size=SIZE, extent=EXTENT):
    """How much of each pixel a shape covers: float32 (T, size, size) in 0..1, for centers (T, 2) in pixels.

    The signed distance from a pixel's middle to the outline, clipped to one pixel: antialiased, at sub-pixel
    positions. The center is that of the bounding box, extent world pixels wide and high.
    """
    half = np.float32(extent / 2 * size / SIZE)
    middles = np.arange(size, dtype=np.float32) + 0.5
    cy, cx = np.asarray(centers, dtype=np.float32).T
    y = middles[None, :, None] - cy[:, None, None]  # (T, size, 1)
    x = np.abs(middles[None, None, :] - cx[:, None, None])  # (T, 1, size); all shapes are their own mirror image
    box = np.maximum(np.abs(y), x) - half
    if shape == "circle":
        outside = np.hypot(y, x) - half
    elif shape == "square":
        outside = box
    elif shape == "triangle":  # apex (-half, 0), base corners (half, +-half); the box trims the tips of the slopes
        outside = np.maximum(box, (2 * x - y - half) / np.float32(math.sqrt(5)))
    else:
        raise ToyError(f"no shape {shape!r}: {', '.join(SHAPES)}")
    return np.clip(0.5 - outside, 0, 1)


def draw(color, shape, background, centers, size=SIZE):
    """uint8 (T, size, size, 3) frames of a shape at centers (T, 2), in pixels of the frame, over a background."""
    levels = np.arange(256)[:, None] / 255
    ramp = (1 - levels) * BACKGROUNDS[background] + levels * COLORS[color]  # (256, 3), from background to shape
    return ramp.round().astype(np.uint8)[(coverage(shape, centers, size) * 255).round().astype(np.uint8)]


def trajectory(direction, times, rng, size=SIZE):
    """Centers (T, 2) in pixels at times (T,) of 0..SECONDS; direction None stands still anywhere in the frame.

    Across the motion the position is uniform over the frame; along it, the middle of the clip is the middle of the
    frame, give or take what little the travel leaves.
    """
    velocity = SPEED * np.array(DIRECTIONS.get(direction, (0, 0)))
    room = SIZE - EXTENT - 2 * MARGIN - np.abs(velocity) * SECONDS  # (2,), px that the path as a whole may shift
    middle = SIZE / 2 + room * rng.uniform(-0.5, 0.5, 2)
    return (middle + velocity * (np.asarray(times)[:, None] - SECONDS / 2)) * size / SIZE


def true_render(scene, rng, frames, fps):
    """What a video of a scene should be like: uint8 (T, SIZE, SIZE, 3), from anywhere along its path."""
    color, shape, direction, background = scene
    times = rng.uniform(0, SECONDS - (frames - 1) / fps) + np.arange(frames) / fps
    return draw(color, shape, background, trajectory(direction, times, rng))


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_png(path, image):
    """image: uint8 (H, W, 3)."""
    height, width, _ = image.shape
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = width, height, "rgb24", Fraction(1)
    packets = encoder.encode(av.VideoFrame.from_ndarray(image)) + encoder.encode(None)
    with open(path, "wb") as file:
        file.write(b"".join(bytes(packet) for packet in packets))


def write_mp4(path, frames):
    """frames: uint8 (T, H, W, 3), H and W even, written at CLIP_FPS as H.264 that colours survive (crf 12)."""
    _, height, width, _ = frames.shape
    with av.open(path, "w") as file:
        # A key frame every half second keeps seeking cheap; one thread, since as many files as cores are in the making.
        stream = file.add_stream("libx264", rate=CLIP_FPS, options={"crf": "12", "preset": "veryfast", "g": "30"})
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.thread_count = width, height, "yuv420p", 1
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode(None))


def _sample(world, kind, index, subject, direction, background, times):
    """(frames, caption) of one file, a function of (world, kind, index) alone, so of no thread's luck. Without times it
    is one frame, at any moment."""
    rng, size = np.random.default_rng([world["seed"], kind, index]), world["size"]
    if times is None:
        times = rng.uniform(0, SECONDS, 1) if direction else [0]
    frames = draw(*subject, background, trajectory(direction, times, rng, size), size)
    named = None if rng.random() < 0.25 else background  # so that prompts without a background work too
    return frames, caption(*subject, direction, named)


def _video(root, index, world):
    """Writes clip number index, returns its row of videos.csv. Any 54 in a row show every triple, 216 also on all."""
    train = triples("train")
    *subject, direction = train[index % len(train)]
    background = list(BACKGROUNDS)[(index + index // len(train)) % len(BACKGROUNDS)]
    times = np.arange(SECONDS * CLIP_FPS) / CLIP_FPS
    frames, name = _sample(world, 0, index, subject, direction, background, times)
    page, number = f"{index // 50 * 50 + 1:06d}_{index // 50 * 50 + 50:06d}", f"{index + 1:08d}"
    url = f"videos/{page}/{number}.mp4"
    os.makedirs(os.path.join(root, "videos", page), exist_ok=True)
    write_mp4(os.path.join(root, url), frames)
    return [number, url, f"PT00H00M{SECONDS:02d}S", page, name]


def _still(index, world):
    """(subject, direction, background) of still number index: all 18 x 4 of subject and background in 72 in a row.
    With `moving`, of every other 72 the subject moves in one of its trained directions; else the direction is None."""
    pairs = [(color, shape) for color in COLORS for shape in SHAPES]
    subject, turn = pairs[index % len(pairs)], index // len(pairs)
    trained = [direction for *pair, direction in triples("train") if tuple(pair) == subject]
    direction = trained[turn % len(trained)] if world["moving"] and index // 72 % 2 else None
    return subject, direction, list(BACKGROUNDS)[(index + turn) % len(BACKGROUNDS)]


def _labelled(root, index, world):
    """Writes labelled image number index into the folder of its label."""
    labels = _labels(world)
    subject, direction, background = _still(index % labels, world)
    frames, _ = _sample(world, 1, index, subject, direction, background, None)
    folder = os.path.join(root, "labels", caption(*subject, direction, background))
    os.makedirs(folder, exist_ok=True)
    write_png(os.path.join(folder, f"{index // labels:03d}.png"), frames[0])


def _labels(world):
    """How many labels there are."""
    return 144 if world["moving"] else 72


def _captioned(root, index, world):
    """Writes captioned image number index, returns its line of images.jsonl."""
    frames, text = _sample(world, 2, index, *_still(index, world), None)
    path = f"images/{index:05d}.png"
    write_png(os.path.join(root, path), frames[0])
    return {"path": path, "caption": text}


def render(folder, seed=0, clips=864, images=16, captioned=720, size=SIZE, moving=False, progress=None, workers=None):
    """Renders a world into folder, which must be absent or empty; the same seed makes the same files.

        videos.csv, videos/<page_dir>/<videoid>.mp4   clips of training triples, in WebVid's form
        labels/<label>/000.png                        images of each of the 72 labels; 144 if `moving`
        images.jsonl, images/00000.png                captioned images
        world.json                                    seed, counts, size

    clips and captioned are totals, images counts per label; size is even and at least 16. With `moving` half of the
    images are of something that moves, and their labels and captions say so: only they can tell a model what a prompt
    of motion looks like at FPS 0 and 120. progress(done, total) is called after each file. Raises ToyError for
    arguments that make no world, OSError for a folder not to be written.
    """
    folder = os.path.abspath(folder)
    if min(seed, clips, images, captioned) < 0:
        raise ToyError("seed and counts must not be negative")
    if size % 2 or size < 16:
        raise ToyError(f"size {size} must be even (H.264's yuv420p) and at least 16")
    if os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise ToyError(f"{folder} is there already: choose another folder, or remove it")
    part = folder + ".part"  # renamed when whole, so that half a world is never taken for one
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(os.path.join(part, "images"))
    try:
        world = {"seed": seed, "clips": clips, "images": images, "captioned": captioned, "size": size,
                 "moving": moving}
        _write(part, world, progress, workers or os.cpu_count())
        if os.path.isdir(folder):
            os.rmdir(folder)
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(root, world, progress, workers):
    """Writes every file of a world. Threads do, for PyAV and numpy release the interpreter while they work."""
    labelled = _labels(world) * world["images"]
    counts = (_video, world["clips"]), (_labelled, labelled), (_captioned, world["captioned"])
    jobs = [(make, i) for make, count in counts for i in range(count)]
    made = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            for result in pool.map(lambda job: job[0](root, job[1], world), jobs):
                made.append(result)
                if progress:
                    progress(len(made), len(jobs))
        finally:
            pool.shutdown(cancel_futures=True)  # an error, or Ctrl-C, does not wait for the files still to come
    with open(os.path.join(root, "videos.csv"), "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["videoid", "contentUrl", "duration", "page_dir", "name"], *made[:world["clips"]]])
    with open(os.path.join(root, "images.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in made[len(made) - world["captioned"]:])
    with open(os.path.join(root, "world.json"), "w", encoding="utf-8") as file:
        json.dump(world, file)


# ---------------------------------------------------------------------------------------------------------------------
# Grading. Thresholds are in world pixels and RGB levels; None always means "cannot tell".

FAINT = 48      # RGB distance from the background up to which a pixel belongs to it: noise reaches 20, shapes 120
SPECK = 3       # px: what has no room for a square of this side is no shape; moving edges leave thin lines in H.264
BLOB = 400      # px: what has room for that many of those squares is no shape either; a blurred one of ours has 150
AGREE = 0.85    # share of pixels, or frames, that must agree before they have one answer: at most 2 frames of 16 err
STILL = 0.08    # px a frame: half of the slowest true motion, SPEED at 60 FPS
ERRATIC = 2     # px that half of the positions are off their straight line, from where on it is no motion at all
WINDOW = 20     # px a side of the window in which shapes are compared
ALIKE = 0.96    # correlation with a template, at least
CLEARLY = 0.7   # the nearest answer is at most this part as far off as the second nearest, or there is none


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


def grade(video, grid=None):
    """Reads a clip of the toy world back: uint8 (T, H, W, 3) to a Grade.

    grid is (rows, cols) of the image the frames were generated in, frame t at row t % rows and column t // rows; when
    None, the factor pair of T nearest to a square. Only wrong_cut depends on it.
    """
    frames, height, width, _ = video.shape
    rows = max(r for r in range(1, math.isqrt(frames) + 1) if frames % r == 0)
    rows, cols = grid or (rows, frames // rows)
    if rows * cols != frames:
        raise ToyError(f"{frames} frames make no grid of {rows} x {cols}")
    scale = min(height, width) / SIZE
    video = video.astype(np.float32)
    ring = np.concatenate([video[:, 0], video[:, -1], video[:, 1:-1, 0], video[:, 1:-1, -1]], axis=1)  # (T, ., 3)
    backdrop = np.median(ring, axis=1)  # (T, 3)
    away = video - backdrop[:, None, None]
    distance = np.sqrt((away**2).sum(-1))  # (T, H, W)
    body, found, crowded = _bodies(distance, scale)
    answer = Grade(None, None, None, _name(ring.reshape(-1, 3), BACKGROUNDS), bool(crowded.any()),
                   np.full((frames, 2), np.nan), math.nan, np.full(frames, np.nan), np.full((frames, 3), np.nan))
    if not found.any():
        return answer

    # The colour of the pixels furthest inside tells how much of every other pixel is covered.
    half = np.quantile(distance[body], 0.9) / 2  # the outline of a blurred shape is where half of it is left
    depth = _box(body & (distance > half), max(1, round(2 * scale)))
    core = body & (depth >= 0.95 * depth.max((1, 2), keepdims=True))
    paint = np.median(video[core], axis=0) - backdrop[:, None, None]  # (T, 1, 1, 3), from the background to the shape
    covered = np.clip((away * paint).sum(-1) / (paint**2).sum(-1).clip(1), 0, 1)
    covered *= _box(body, max(1, round(scale))) > 0  # the shape and its soft outline, none of the noise elsewhere
    found &= covered.sum((1, 2)) > (SPECK * scale)**2
    answer.wrong_cut |= _cut((distance > half).reshape(cols, rows, height, width))
    answer.centers[found] = _centroids(covered[found]) / scale
    answer.areas[found] = covered[found].sum((1, 2)) / scale**2
    answer.paints[found] = [np.median(video[t][core[t]], axis=0) for t in np.flatnonzero(found)]
    if found.mean() < AGREE:
        return answer
    answer.color = _name(video[core], COLORS)
    answer.shape = _shape(covered[found], answer.centers[found] * scale, scale)
    answer.direction, answer.speed = _motion(np.flatnonzero(found), answer.centers[found])
    return answer


def _bodies(distance, scale):
    """Shapes where distance (T, H, W) from the background is not FAINT.

    Returns the mask (T, H, W) of each frame's largest, whether there is one (T,), and whether there are several (T,).
    """
    parts = _components(distance > FAINT)
    thick = _box(parts > 0, max(1, round((SPECK * scale - 1) / 2))) == 1  # the middles of squares that fit
    sizes = np.stack([np.bincount(frame.ravel(), minlength=parts[0].size + 1) for frame in parts * thick])[:, 1:]
    found = (sizes.max(1) > 0) & (sizes.max(1) < BLOB * scale**2)
    body = (parts == sizes.argmax(1)[:, None, None] + 1) & found[:, None, None]
    return body, found, (sizes > 0).sum(1) > 1


def _name(pixels, palette):
    """The palette's name for pixels (N, 3), if they agree and it is clearly nearer than the second nearest."""
    color = np.median(pixels, axis=0)
    near = np.sqrt(((pixels - color)**2).sum(-1)) < FAINT
    distances = np.sqrt(((np.array(list(palette.values())) - color)**2).sum(-1))
    first, second = np.sort(distances)[:2]
    clear = near.mean() >= AGREE and first < 60 and first < CLEARLY * second  # 60: half of what any two are apart
    return list(palette)[distances.argmin()] if clear else None


def _box(images, radius):
    """Mean of the square of 2 radius + 1 pixels around each pixel of images (T, H, W), zero outside."""
    images = np.pad(images, ((0, 0), (radius, radius), (radius, radius)))
    for axis in (1, 2):
        images = sliding_window_view(images, 2 * radius + 1, axis).mean(-1)
    return images


def _components(mask):
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


def _cut(solid):
    """Whether a shape continues across a border between cells, in masks (cols, rows, H, W)."""
    below = solid[:, :-1, -1, :], solid[:, 1:, 0, :]  # the two sides of the borders between rows
    beside = solid[:-1, :, :, -1], solid[1:, :, :, 0]
    return any(bool(((one & two).sum(-1) >= 2).any()) for one, two in (below, beside))  # one pixel may be noise


def _centroids(covered):
    """(T, 2) centers of mass of coverages (T, H, W), pixel i lying at i + 0.5."""
    mass = covered.sum((1, 2))
    y = (covered.sum(2) * (np.arange(covered.shape[1]) + 0.5)).sum(1)
    x = (covered.sum(1) * (np.arange(covered.shape[2]) + 0.5)).sum(1)
    return np.stack([y, x], axis=1) / mass[:, None]


def _aligned(covered, centers, scale):
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


@cache
def _templates():
    """What _aligned makes of each true shape, somewhat smaller and larger, sharp and blurred: list of (6, pixels)."""
    middles = SIZE / 2 + np.stack(np.meshgrid([0, 0.25, 0.5, 0.75], [0, 0.25, 0.5, 0.75]), -1).reshape(-1, 2)
    looks = []
    for shape in SHAPES:
        sharp = [coverage(shape, middles, extent=EXTENT * growth) for growth in (0.9, 1, 1.1)]
        both = sharp + [_box(images, 1) for images in sharp]
        looks.append(np.stack([_standard(_aligned(images, _centroids(images), 1)) for images in both]))
    return looks


def _standard(image):
    """An image as a vector of mean 0 and length 1, so that the product of two is their correlation."""
    vector = image.ravel() - image.mean()
    return vector / max(np.linalg.norm(vector), 1e-6)


def _shape(covered, centers, scale):
    """The shape whose templates coverages (T, H, W) with centroids (T, 2), all in pixels, are most like, or None."""
    seen = _standard(_aligned(covered, centers, scale))
    likeness = np.array([(looks @ seen).max() for looks in _templates()])
    second, first = np.sort(likeness)[-2:]
    return SHAPES[likeness.argmax()] if first > ALIKE and 1 - first < CLEARLY * (1 - second) else None


def _motion(times, centers):
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


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def main():
    parser = argparse.ArgumentParser(description="Render the toy world into a folder.")
    parser.error = lambda message: parser.exit(2, f"toy.py: {message} (see --help)\n")  # one line, without the usage
    parser.add_argument("folder", metavar="DIR", help="absent or empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clips", type=int, default=864, metavar="N", help="videos (864)")
    parser.add_argument("--images", type=int, default=16, metavar="N", help="labelled images of each label (16)")
    parser.add_argument("--captioned", type=int, default=720, metavar="N", help="captioned images (720)")
    parser.add_argument("--moving", action="store_true", help="half of the images are of something that moves")
    parser.add_argument("--size", type=int, default=SIZE, metavar="PX", help=f"pixels a side ({SIZE})")

    def progress(done, total):
        if done % 20 == 0 or done == total:
            print(f"\r{done}/{total} files", end="\n" if done == total else "", file=sys.stderr, flush=True)

    try:
        render(**vars(parser.parse_args()), progress=progress)
    except (ToyError, OSError) as error:
        parser.exit(2, f"toy.py: {error}\n")


if __name__ == "__main__":
    main()
